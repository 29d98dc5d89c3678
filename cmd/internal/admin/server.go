// Package admin is the HTTP API over a Daemon: everything that Roost knows and
// why, for people, scripts and the command line. Requests go in, JSON comes
// out, with errors as RFC 9457 problem documents and its OpenAPI document at
// /openapi.json. It keeps no state and starts no goroutine but the server's.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/roostmesh/roost/cmd/internal/daemon"
)

const (
	readTimeout   = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeaderSize = 64 << 10
	maxBody       = 1 << 20
	maxImport     = 64 << 20 // a ledger of 100,000 services
	shutdownGrace = time.Second
)

// api is the handlers' common ground.
type api struct {
	d       *daemon.Daemon
	version string
	started time.Time
	log     *slog.Logger
}

// New returns the API as a handler.
func New(d *daemon.Daemon, version string, log *slog.Logger) http.Handler {
	a := &api{d: d, version: version, started: time.Now(), log: log}
	mux := http.NewServeMux()
	config := huma.DefaultConfig("Roost", version)
	config.DocsPath, config.SchemasPath = "", ""
	config.CreateHooks = nil // no $schema link in every answer
	config.Info.Description = "Why every request goes where it goes."
	h := humago.New(mux, config)
	a.register(h)
	d.Registry.MustRegister(newEnvoyCollector(d, log))
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.Registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	return a.guard(a.stream(found(mux)))
}

// Serve serves the API on every listener until ctx ends.
func Serve(ctx context.Context, h http.Handler, log *slog.Logger, listeners ...net.Listener) error {
	stop, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderSize,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return stop },
	}
	var group errgroup.Group
	for _, l := range listeners {
		group.Go(func() error {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		cancel() // ends event streams
		grace, done := context.WithTimeout(context.Background(), shutdownGrace)
		defer done()
		if err := s.Shutdown(grace); err != nil {
			return s.Close()
		}
		return nil
	})
	return group.Wait()
}

// guard bounds bodies and refuses what a browser was tricked into sending:
// another Host (DNS rebinding) or another Origin.
func (a *api) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		unix := local != nil && local.Network() == "unix"
		if !unix && !ownHost(r.Host) {
			problem(w, http.StatusForbidden, "Host "+r.Host+" is not this API: use localhost or the address itself")
			return
		}
		if origin := r.Header.Get("Origin"); origin != "" && !sameOrigin(origin, r.Host) {
			problem(w, http.StatusForbidden, "Origin "+origin+" may not use this API")
			return
		}
		limit := int64(maxBody)
		if r.URL.Path == importPath {
			limit = maxImport
		}
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		next.ServeHTTP(w, r)
	})
}

func ownHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

func sameOrigin(origin, host string) bool {
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, host)
}

// found answers what no handler has as a problem document.
func found(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
			other := *r
			other.Method = method
			if _, pattern := mux.Handler(&other); pattern != "" {
				w.Header().Set("Allow", method)
				problem(w, http.StatusMethodNotAllowed, r.Method+" is not for this path; "+method+" is")
				return
			}
		}
		problem(w, http.StatusNotFound, "there is no "+r.URL.Path+"; /openapi.json lists what there is")
	})
}

func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(huma.ErrorModel{Title: http.StatusText(status), Status: status, Detail: detail})
}
