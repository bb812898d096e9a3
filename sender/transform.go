package sender

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/walhook/walhook/outbox"
	"github.com/walhook/walhook/outbox/rule"
)

// methods are those that send something; a GET would have no body for it.
var methods = []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}

// maxMadeHeaders is how many bytes the headers that a rule makes may have; many servers take 8
// KiB of them in all.
const maxMadeHeaders = 8 << 10

// checkTransform finds what cannot be of an endpoint's transform.
func checkTransform(t *outbox.Transform) (errs []error) {
	if t.Body != nil && t.Form != nil {
		errs = append(errs, errors.New("transform: has both body and form; a request has one body"))
	}
	if t.Method != "" && !slices.Contains(methods, t.Method) {
		errs = append(errs, fmt.Errorf("transform.method: %q is not one of %s", t.Method, strings.Join(methods, ", ")))
	}
	return errs
}

// failed is what becomes of an event that a rule of the transform cannot make anything of.
func failed(key string, err error) *unsendable {
	return &unsendable{outbox.ReasonTransform, "transform." + key + ": " + err.Error()}
}

// transformBody makes the body by the endpoint's own rule, in the place of the format's.
func (t *target) transformBody(e *outbox.Event) (*body, string, *unsendable) {
	key, contentType := "body", "application/json"
	var text []byte
	var err error
	if r := t.endpoint.Transform.Body; r != nil {
		text, err = r.JSON(e.View(), t.endpoint.MaxPayload)
	} else {
		key, contentType = "form", "application/x-www-form-urlencoded"
		text, err = t.endpoint.Transform.Form.Encode(e.View(), t.endpoint.MaxPayload)
	}
	if errors.Is(err, rule.ErrTooLong) {
		return nil, "", &unsendable{outbox.ReasonTooLarge, fmt.Sprintf("transform.%s: the body would have more than max_payload, %d bytes", key, t.endpoint.MaxPayload)}
	}
	if err != nil {
		return nil, "", failed(key, err)
	}
	return &body{parts: [3][]byte{text}}, contentType, nil
}

// transformHeaders sets the headers that the endpoint's own rule makes, in the place of static ones of the
// same name. They are held to what static ones are held to.
func (t *target) transformHeaders(m *message, e *outbox.Event) *unsendable {
	r := t.endpoint.Transform.Headers
	if r == nil {
		return nil
	}
	all, err := r.All(e.View())
	if err != nil {
		return failed("headers", err)
	}
	size, before := 0, ""
	for _, h := range all {
		lower, why := strings.ToLower(h.Name), ""
		switch size += len(h.Name) + len(h.Value) + len(": \r\n"); {
		case !validHeaderName(h.Name):
			why = "is not a valid header name"
		case reservedHeader(lower), slices.Contains(t.taken, lower):
			why = "is set by walhook and cannot be made"
		case lower == before:
			why = "is there twice"
		case !validHeaderValue(h.Value):
			why = "would have a line break, NUL or another control character in its value"
		case size > maxMadeHeaders:
			return failed("headers", fmt.Errorf("more than %d bytes of headers", maxMadeHeaders))
		}
		if why != "" {
			return failed("headers", fmt.Errorf("%.60q %s", h.Name, why))
		}
		before = lower
		m.set(spelled(h.Name), h.Value)
	}
	return nil
}

// transformURL puts the path and query that the endpoint's own rule makes in the place of the
// URL's. Scheme and host stay.
func (t *target) transformURL(m *message, e *outbox.Event) *unsendable {
	r := t.endpoint.Transform.URL
	if r == nil {
		return nil
	}
	path, err := r.Path(e.View())
	if err != nil {
		return failed("url", err)
	}
	to, err := url.Parse(path)
	if err != nil || to.IsAbs() || to.Host != "" || to.User != nil || to.Opaque != "" || to.Fragment != "" {
		return failed("url", errors.New("the result is not a path with or without a query"))
	}
	to.Scheme, to.Host = t.base.URL.Scheme, t.base.URL.Host
	m.url = to
	return nil
}
