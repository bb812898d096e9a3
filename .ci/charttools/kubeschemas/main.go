// Command kubeschemas makes the schemas that kubeconform reads, for use without its repository of schemas:
//
//	kubeschemas DIR kubernetes VERSION …   from the OpenAPI of Kubernetes
//	kubeschemas DIR crds MODULE VERSION    from the CustomResourceDefinitions in a Go module
//
// Both come out of a module's zip on the Go module proxy, of which only the parts that are needed are fetched.
package main

import (
	"archive/zip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"sigs.k8s.io/yaml"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "kubeschemas:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) > 2 && args[1] == "kubernetes":
		for _, version := range args[2:] {
			if err := kubernetes(ctx, filepath.Join(args[0], version+"-standalone-strict"), version); err != nil {
				return err
			}
		}
		return nil
	case len(args) == 4 && args[1] == "crds":
		return crds(ctx, args[0], args[2], args[3])
	}
	return fmt.Errorf("usage: kubeschemas DIR kubernetes VERSION… | crds MODULE VERSION")
}

type object = map[string]any

func kubernetes(ctx context.Context, dir, version string) error {
	var src []byte
	err := fromModule(ctx, "k8s.io/kubernetes", version, "/api/openapi-spec/swagger.json", func(_ string, text []byte) error {
		src = text
		return nil
	})
	if err != nil {
		return err
	}
	var spec struct{ Definitions map[string]object }
	if err := json.Unmarshal(src, &spec); err != nil {
		return err
	}
	defs := object{}
	for name, def := range spec.Definitions {
		defs[name] = strict(def)
	}
	// What the specification calls a string is more than that.
	defs["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = object{"type": []string{"string", "integer"}}
	defs["io.k8s.apimachinery.pkg.api.resource.Quantity"] = object{"type": []string{"string", "number"}}
	if err := write(dir, "_definitions.json", object{"definitions": defs}); err != nil {
		return err
	}
	for name, def := range spec.Definitions {
		kinds, _ := def["x-kubernetes-group-version-kind"].([]any)
		made, _ := defs[name].(object)
		properties, _ := made["properties"].(object)
		for _, k := range kinds {
			group, version, kind := k.(object)["group"].(string), k.(object)["version"].(string), k.(object)["kind"].(string)
			if properties["kind"] == nil {
				continue
			}
			parts := []string{strings.ToLower(kind)}
			apiVersion := version
			if group != "" {
				parts = append(parts, strings.Split(group, ".")[0])
				apiVersion = group + "/" + version
			}
			one := object{}
			for key, v := range made {
				one[key] = v
			}
			of := object{}
			for key, v := range properties {
				of[key] = v
			}
			of["apiVersion"], of["kind"] = object{"enum": []string{apiVersion}}, object{"enum": []string{kind}}
			one["properties"] = of
			if err := write(dir, strings.Join(append(parts, version), "-")+".json", one); err != nil {
				return err
			}
		}
	}
	return nil
}

func crds(ctx context.Context, dir, module, version string) error {
	return fromModule(ctx, module, version, ".yaml", func(name string, text []byte) error {
		if !strings.Contains(name, "/example/prometheus-operator-crd/") {
			return nil
		}
		var crd struct {
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Schema struct{ OpenAPIV3Schema object }
				}
			}
		}
		if err := yaml.Unmarshal(text, &crd); err != nil {
			return err
		}
		for _, v := range crd.Spec.Versions {
			file := strings.ToLower(crd.Spec.Names.Kind) + "-" + strings.Split(crd.Spec.Group, ".")[0] + "-" + v.Name + ".json"
			if err := write(dir, file, strict(v.Schema.OpenAPIV3Schema)); err != nil {
				return err
			}
		}
		return nil
	})
}

// strict is a schema that refuses unknown properties, and takes null as the API server does.
func strict(node any) any {
	switch node := node.(type) {
	case []any:
		all := make([]any, len(node))
		for i, v := range node {
			all[i] = strict(v)
		}
		return all
	case object:
		out := object{}
		for key, v := range node {
			switch {
			case key == "$ref":
				out[key] = "_definitions.json" + v.(string)
			case key == "properties":
				of := object{}
				for name, p := range v.(object) {
					made := strict(p)
					if m, ok := made.(object); ok {
						if t, ok := m["type"].(string); ok {
							m["type"] = []string{t, "null"}
						}
					}
					of[name] = made
				}
				out[key] = of
			default:
				out[key] = strict(v)
			}
		}
		if node["x-kubernetes-int-or-string"] == true {
			out["type"] = []string{"string", "integer", "null"}
		}
		if out["properties"] != nil && out["additionalProperties"] == nil && node["x-kubernetes-preserve-unknown-fields"] == nil {
			out["additionalProperties"] = false
		}
		return out
	}
	return node
}

func write(dir, name string, schema any) error {
	text, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), text, 0o644)
}

// fromModule hands on the files of a module whose names end so.
func fromModule(ctx context.Context, module, version, suffix string, found func(name string, text []byte) error) error {
	proxies, err := exec.CommandContext(ctx, "go", "env", "GOPROXY").Output()
	if err != nil {
		return err
	}
	for proxy := range strings.FieldsFuncSeq(string(proxies), func(r rune) bool { return r == ',' || r == '|' || unicode.IsSpace(r) }) {
		if !strings.HasPrefix(proxy, "http") {
			continue
		}
		file := &remote{ctx: ctx, url: strings.TrimSuffix(proxy, "/") + "/" + module + "/@v/" + version + ".zip"}
		size, err := file.size()
		if err != nil {
			return err
		}
		z, err := zip.NewReader(file, size)
		if err != nil {
			return fmt.Errorf("%s: %w", file.url, err)
		}
		none := true
		for _, f := range z.File {
			if !strings.HasSuffix(f.Name, suffix) {
				continue
			}
			none = false
			r, err := f.Open()
			if err != nil {
				return err
			}
			text, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				return err
			}
			if err := found(f.Name, text); err != nil {
				return fmt.Errorf("%s: %w", f.Name, err)
			}
		}
		if none {
			return fmt.Errorf("%s has no %s", file.url, suffix)
		}
		return nil
	}
	return fmt.Errorf("GOPROXY names no module proxy")
}

// remote is a file on a server, read in blocks that are kept.
type remote struct {
	ctx    context.Context
	url    string
	blocks map[int64][]byte
}

const block = 1 << 20

func (r *remote) get(method, span string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(r.ctx, method, r.url, nil)
	if err != nil {
		return nil, err
	}
	if span != "" {
		req.Header.Set("range", span)
	}
	answer, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode/100 != 2 {
		answer.Body.Close()
		return nil, fmt.Errorf("%s: %s", r.url, answer.Status)
	}
	return answer, nil
}

func (r *remote) size() (int64, error) {
	answer, err := r.get(http.MethodHead, "")
	if err != nil {
		return 0, err
	}
	answer.Body.Close()
	if answer.ContentLength <= 0 {
		return 0, fmt.Errorf("%s: does not tell its length", r.url)
	}
	return answer.ContentLength, nil
}

func (r *remote) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := (off + int64(n)) / block
		text, has := r.blocks[at]
		if !has {
			answer, err := r.get(http.MethodGet, fmt.Sprintf("bytes=%d-%d", at*block, (at+1)*block-1))
			if err != nil {
				return n, err
			}
			if answer.StatusCode == http.StatusOK { // it sends all of it
				_, err = io.CopyN(io.Discard, answer.Body, at*block)
			}
			if err == nil {
				text, err = io.ReadAll(io.LimitReader(answer.Body, block))
			}
			answer.Body.Close()
			if err != nil {
				return n, err
			}
			if r.blocks == nil {
				r.blocks = map[int64][]byte{}
			}
			r.blocks[at] = text
		}
		from := (off + int64(n)) % block
		if from >= int64(len(text)) {
			return n, io.EOF
		}
		n += copy(p[n:], text[from:])
	}
	return n, nil
}
