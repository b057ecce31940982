package main

import (
	"cmp"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/zitadel/oidc/v3/pkg/op"
)

// origin is ZITADEL's own address. It follows the host of the request, including the port
// (docs/reference/zitadel-protocol.md#instance-selection).
func (s settings) origin(host string) string { return s.scheme("") + "://" + host }

func (s settings) scheme(forwarded string) string {
	if s.ExternalSecure {
		return "https"
	}
	return cmp.Or(forwarded, "http")
}

// selectInstance accepts a request whose host names this instance, and adds the issuer for that host to the
// context of the request.
func selectInstance(users *directory, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := users.settings()
		host := cmp.Or(r.Header.Get("x-zitadel-instance-host"), r.Header.Get("x-forwarded-host"), r.Host)
		public := r.Header.Get("x-zitadel-public-host")
		scheme := s.scheme(r.Header.Get("x-forwarded-proto"))

		reason := ""
		switch {
		case nameOf(host) != s.ExternalDomain:
			reason = "ID=QUERY-1kIjX Message=" + instanceNotFound
		case public != "" && nameOf(public) != s.ExternalDomain:
			reason = fmt.Sprintf("ID=QUERY-IuGh1 Message=%s Parent=(public domain %q not trusted)", instanceNotFound, nameOf(public))
		}
		if reason == "" {
			issuer := scheme + "://" + cmp.Or(public, host)
			next.ServeHTTP(w, r.WithContext(op.ContextWithIssuer(r.Context(), issuer)))
			return
		}
		text := fmt.Sprintf("unable to set instance using origin &{%s %s %s} (ExternalDomain is %s): %s", host, public, scheme, s.ExternalDomain, reason)
		if strings.HasPrefix(r.URL.Path, "/zitadel.") {
			writeConnectError(w, apiError{Code: codeNotFound, Message: text})
			return
		}
		if strings.HasPrefix(r.URL.Path, "/management/") || strings.HasPrefix(r.URL.Path, "/v2/") {
			writeAPIError(w, apiError{Code: codeNotFound, Message: text})
			return
		}
		http.Error(w, text, http.StatusNotFound)
	})
}

const instanceNotFound = "Instance not found. Make sure you got the domain right. Check out https://zitadel.com/docs/apis/introduction#domains"

// nameOf strips the port. The rest is compared with its case.
func nameOf(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return host
}
