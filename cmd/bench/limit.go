package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/valyala/fasthttp"
	"golang.org/x/sync/errgroup"
)

// The roles of the limits; doc.go says what each is.
const (
	roleRead  = "read"
	roleSend  = "send"
	roleChain = "chain"
)

// The clients of the limits.
const (
	netHTTP  = "net/http"
	fastHTTP = "fasthttp"
)

var clients = []string{netHTTP, fastHTTP}

// limitOrder says what a limit is to do.
type limitOrder struct {
	Count int `json:"count"` // rows, or requests

	Database    string `json:"database,omitempty"` // of read and chain
	Slot        string `json:"slot,omitempty"`
	Publication string `json:"publication,omitempty"`

	Client  string `json:"client,omitempty"` // of send and chain
	Workers int    `json:"workers,omitempty"`
	URL     string `json:"url,omitempty"`
	First   int64  `json:"first,omitempty"` // id, of send
	Size    int    `json:"size,omitempty"`  // bytes of a payload, of send
}

// play gets ready, says so, and begins when it is told to.
func (o *limitOrder) play(ctx context.Context, role string, s *stage) error {
	var act func() error
	begin, end := time.Time{}, time.Time{}
	switch role {
	case roleRead, roleChain:
		conn, err := o.connect(ctx)
		if err != nil {
			return err
		}
		defer conn.Close(context.WithoutCancel(ctx))
		act = func() (err error) {
			begin, end, err = o.read(ctx, conn, role == roleChain)
			return err
		}
	case roleSend:
		act = func() error {
			begin = time.Now()
			err := o.send(ctx)
			end = time.Now()
			return err
		}
	default:
		return errors.New("there is no such role")
	}
	if err := s.say(word{Event: "ready"}); err != nil {
		return err
	}
	if err := s.await(); err != nil {
		return err
	}
	if err := act(); err != nil {
		return err
	}
	return s.say(word{Event: "done", Begin: begin.UnixNano(), End: end.UnixNano(), Rows: o.Count})
}

// connect opens a connection that can stream.
func (o *limitOrder) connect(ctx context.Context) (*pgconn.PgConn, error) {
	c, err := pgconn.ParseConfig(o.Database)
	if err != nil {
		return nil, err
	}
	c.RuntimeParams["replication"] = "database"
	c.RuntimeParams["application_name"] = "bench limit"
	return pgconn.ConnectConfig(ctx, c)
}

// parcel is a row on its way from the reader to a worker of the chain.
type parcel struct {
	id, kind string
	at       time.Time
	data     []byte
}

// read reads as pglogrepl's own example does, with walhook's settings of the plugin. Where it
// feeds workers, it returns when they have sent everything.
func (o *limitOrder) read(ctx context.Context, conn *pgconn.PgConn, feed bool) (begin, end time.Time, err error) {
	g, ctx := errgroup.WithContext(ctx)
	var parcels chan parcel
	if feed {
		parcels = make(chan parcel, 1024)
		for range o.Workers {
			g.Go(func() error { return o.post(parcels) })
		}
	}
	g.Go(func() error {
		if feed {
			defer close(parcels)
		}
		begin, end, err = o.stream(ctx, conn, parcels)
		return err
	})
	err = g.Wait()
	return begin, end, err
}

func (o *limitOrder) stream(ctx context.Context, conn *pgconn.PgConn, parcels chan<- parcel) (begin, end time.Time, err error) {
	err = pglogrepl.StartReplication(ctx, conn, o.Slot, 0, pglogrepl.StartReplicationOptions{
		Mode:       pglogrepl.LogicalReplication,
		PluginArgs: []string{"proto_version '1'", fmt.Sprintf(`publication_names '"%s"'`, o.Publication)},
	})
	if err != nil {
		return begin, end, fmt.Errorf("start streaming: %w", err)
	}
	const statusEvery = 10 * time.Second
	var received pglogrepl.LSN
	var committed time.Time
	due := time.Now().Add(statusEvery)
	for rows := 0; rows < o.Count; {
		raw, err := conn.ReceiveMessage(ctx)
		if err != nil {
			return begin, end, fmt.Errorf("receive: %w", err)
		}
		reply := false
		switch m := raw.(type) {
		case *pgproto3.ErrorResponse:
			return begin, end, fmt.Errorf("receive: %w", pgconn.ErrorResponseToPgError(m))
		case *pgproto3.CopyData:
			switch m.Data[0] {
			case pglogrepl.PrimaryKeepaliveMessageByteID:
				k, err := pglogrepl.ParsePrimaryKeepaliveMessage(m.Data[1:])
				if err != nil {
					return begin, end, err
				}
				reply = k.ReplyRequested
			case pglogrepl.XLogDataByteID:
				if begin.IsZero() {
					begin = time.Now()
				}
				x, err := pglogrepl.ParseXLogData(m.Data[1:])
				if err != nil {
					return begin, end, err
				}
				parsed, err := pglogrepl.Parse(x.WALData)
				if err != nil {
					return begin, end, err
				}
				received = max(received, x.WALStart+pglogrepl.LSN(len(x.WALData)))
				switch p := parsed.(type) {
				case *pglogrepl.BeginMessage:
					committed = p.CommitTime
				case *pglogrepl.InsertMessage:
					rows++
					if parcels == nil {
						break
					}
					columns := p.Tuple.Columns
					item := parcel{id: string(columns[0].Data), kind: string(columns[2].Data), at: committed, data: columns[3].Data}
					select {
					case parcels <- item:
					case <-ctx.Done():
						return begin, end, ctx.Err()
					}
				}
			}
		}
		if reply || rows%1024 == 0 && time.Now().After(due) {
			due = time.Now().Add(statusEvery)
			if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: received}); err != nil {
				return begin, end, fmt.Errorf("send status: %w", err)
			}
		}
	}
	return begin, time.Now(), nil
}

// post is a worker of the chain.
func (o *limitOrder) post(parcels <-chan parcel) error {
	p, err := newPoster(o.Client, o.URL)
	if err != nil {
		return err
	}
	var body []byte
	for item := range parcels {
		body = appendBody(body[:0], item)
		if err := p.post(item.id, body); err != nil {
			return err
		}
	}
	return nil
}

// appendBody renders the format standard.
func appendBody(dst []byte, p parcel) []byte {
	dst = append(append(append(dst, `{"type":"`...), p.kind...), `","timestamp":"`...)
	dst = append(p.at.UTC().AppendFormat(dst, time.RFC3339Nano), `","data":`...)
	return append(append(dst, p.data...), '}')
}

// send sends the same requests with a body that is rendered once.
func (o *limitOrder) send(ctx context.Context) error {
	g, _ := errgroup.WithContext(ctx)
	body := appendBody(nil, parcel{kind: eventType, at: time.Now().Truncate(time.Microsecond), data: []byte(payload(0, padding(o.Size), o.Size))})
	for w := range o.Workers {
		g.Go(func() error {
			p, err := newPoster(o.Client, o.URL)
			if err != nil {
				return err
			}
			for i := w; i < o.Count; i += o.Workers {
				if err := p.post(strconv.FormatInt(o.First+int64(i), 10), body); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// What stands in the headers of a limit's requests, beside the id: of the length of walhook's.
const (
	userAgent     = "walhook/0.0.0"
	anyTimestamp  = "1700000000"
	anySignature  = "v1,kESoAGB4acRoZM/GyeKQ9Z3hd2x5IWXfPEtnHiSEDZs="
	contentType   = "application/json"
	headerID      = "webhook-id"
	headerTime    = "webhook-timestamp"
	headerSigned  = "webhook-signature"
	headerAttempt = "webhook-attempt"
)

// poster sends for one worker. It may keep what it is given until it returns.
type poster interface {
	post(id string, body []byte) error
}

// newPoster makes a poster with a connection of its own, so that no two workers wait for each other.
func newPoster(client, to string) (poster, error) {
	u, err := url.Parse(to)
	if err != nil {
		return nil, err
	}
	switch client {
	case netHTTP:
		return newPlainPoster(u), nil
	case fastHTTP:
		return newFastPoster(u), nil
	}
	return nil, fmt.Errorf("unknown client %q", client)
}

// plainPoster is net/http without http.Client above it, which would only add redirects and cookies.
type plainPoster struct {
	transport *http.Transport
	url       *url.URL
	header    http.Header
	id        []string
}

func newPlainPoster(u *url.URL) *plainPoster {
	p := &plainPoster{
		transport: &http.Transport{
			MaxIdleConnsPerHost: 1,
			DisableCompression:  true,
			Protocols:           new(http.Protocols),
		},
		url: u,
		id:  make([]string, 1),
	}
	p.transport.Protocols.SetHTTP1(true)
	p.header = http.Header{
		"Content-Type": {contentType}, "User-Agent": {userAgent}, headerID: p.id, headerTime: {anyTimestamp},
		headerAttempt: {"1"}, headerSigned: {anySignature},
	}
	return p
}

func (p *plainPoster) post(id string, body []byte) error {
	p.id[0] = id
	resp, err := p.transport.RoundTrip(&http.Request{
		Method: http.MethodPost, URL: p.url, Host: p.url.Host, Header: p.header,
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)),
	})
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("the receiver answered %d", resp.StatusCode)
	}
	return err
}

// fastPoster is fasthttp.
type fastPoster struct {
	client *fasthttp.HostClient
	req    fasthttp.Request
	resp   fasthttp.Response
}

func newFastPoster(u *url.URL) *fastPoster {
	p := &fastPoster{client: &fasthttp.HostClient{
		Addr: u.Host, MaxConns: 1,
		DisableHeaderNamesNormalizing: true, DisablePathNormalizing: true,
	}}
	h := &p.req.Header
	h.DisableNormalizing()
	h.SetMethod(fasthttp.MethodPost)
	h.SetContentType(contentType)
	h.SetUserAgent(userAgent)
	h.Set(headerTime, anyTimestamp)
	h.Set(headerAttempt, "1")
	h.Set(headerSigned, anySignature)
	p.req.SetRequestURI(u.String())
	return p
}

func (p *fastPoster) post(id string, body []byte) error {
	p.req.Header.Set(headerID, id)
	p.req.SetBodyRaw(body)
	if err := p.client.Do(&p.req, &p.resp); err != nil {
		return err
	}
	if status := p.resp.StatusCode(); status/100 != 2 {
		return fmt.Errorf("the receiver answered %d", status)
	}
	return nil
}

// eventType is that of all events.
const eventType = "order.changed"

// payloadFrame is what stands around the padding of a payload with a short time, as jsonb prints it.
const payloadFrame = len(`{"at": 0, "pad": ""}`)

// payload is an event's data of size bytes or a little more, as jsonb prints it.
func payload(at int64, pad string, size int) string {
	return `{"at": ` + strconv.FormatInt(at, 10) + `, "pad": "` + pad[:max(0, size-payloadFrame)] + `"}`
}

// padding is at least so many characters of which Postgres can compress none away.
func padding(size int) string {
	const digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	rng := rand.New(rand.NewPCG(1, 2))
	var b strings.Builder
	for range size {
		b.WriteByte(digits[rng.IntN(len(digits))])
	}
	return b.String()
}
