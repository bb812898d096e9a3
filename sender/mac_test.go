package sender

import (
	"bytes"
	"crypto/hmac"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Keys shorter than a block of the hash function, as long, and longer; one after the other on the same mac.
func TestMACsAreThoseOfTheLibrary(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	fill := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	for name, known := range algorithms {
		by := &macs{make: known.make} // whose pool nobody else draws from
		block := by.make().BlockSize()
		for _, n := range []int{0, 1, 20, 32, block - 1, block, block + 1, 3 * block, 5} {
			for _, length := range []int{0, 1, block, 1000} {
				key, text := fill(n), fill(length)
				want := hmac.New(by.make, key)
				want.Write(text)
				k := newMAC(by, bytes.Clone(key), "")
				m := by.get()
				m.begin(k.key)
				m.Write(text[:length/3])
				m.Write(text[length/3:])
				require.Equal(t, want.Sum(nil), m.end(), "%s, key of %d bytes", name, n)
				by.put(m)
				require.Equal(t, make([]byte, block), m.pad, "no key is left behind")
			}
		}
	}
}

func TestMACsOfManyKeysAtOnce(t *testing.T) {
	t.Parallel()
	var group sync.WaitGroup
	for n := range 8 {
		group.Go(func() {
			key, text := bytes.Repeat([]byte{byte(n)}, 32), []byte("text")
			want := hmac.New(algorithms["sha256"].make, key)
			want.Write(text)
			k := newMAC(algorithms["sha256"], key, "")
			for range 200 {
				m := k.macs.get()
				m.begin(k.key)
				m.Write(text)
				got := bytes.Clone(m.end())
				k.macs.put(m)
				if !bytes.Equal(got, want.Sum(nil)) {
					t.Error("not that of its key")
				}
			}
		})
	}
	group.Wait()
}
