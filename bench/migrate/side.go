package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// pollers ask a service's address at once, so that round robin meets the new
// instance soon.
const pollers = 4

// side is one of the two that are compared: a service, its instances, and the
// address through which it is called.
type side struct {
	b       *bench
	name    string
	address string
	meta    map[string]string
	next    int
	apps    []*app // running, the oldest first
	took    []time.Duration
	client  *http.Client
}

// app is one instance; it answers its name.
type app struct {
	name   string
	port   int
	server *http.Server
}

func newSide(b *bench, name, address string, meta map[string]string) (*side, error) {
	s := &side{b: b, name: name, address: address, meta: meta, client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	for range instances {
		a, err := s.start()
		if err != nil {
			return nil, err
		}
		if err := s.register(a); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *side) label() string {
	if s.name == "floor" {
		return "Consul, LinearCache, Envoy"
	}
	return "Roost"
}

func (s *side) start() (*app, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.next++
	a := &app{name: fmt.Sprintf("%s-%d", s.name, s.next), port: l.Addr().(*net.TCPAddr).Port}
	a.server = &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, a.name) })}
	go func() { _ = a.server.Serve(l) }() // ends with Close
	s.apps = append(s.apps, a)
	return a, nil
}

func (s *side) register(a *app) error {
	return s.b.client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: a.name, Name: s.name, Address: "127.0.0.1", Port: a.port, Meta: s.meta})
}

func (s *side) close() {
	for _, a := range s.apps {
		_ = a.server.Close()
	}
	s.client.CloseIdleConnections()
}

func (s *side) ask(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.address+"/", nil)
	if err != nil {
		return "", err
	}
	res, err := s.client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s", res.Status, body)
	}
	return string(body), err
}

// ready waits until every instance has answered through the address.
func (s *side) ready(ctx context.Context) error {
	seen := map[string]bool{}
	return until(ctx, 30*time.Second, func() error {
		name, err := s.ask(ctx)
		if err != nil {
			return err
		}
		if seen[name] = true; len(seen) < instances {
			return fmt.Errorf("%d of %d instances have answered", len(seen), instances)
		}
		return nil
	})
}

// settled is the pause between a move and the next, so that one does not
// measure the other's work.
const settled = 30 * time.Millisecond

// move registers a new instance, waits for its first answer, and deregisters
// and ends the oldest one. Where measured, the time is taken from the start of
// the registration.
func (s *side) move(ctx context.Context, measured bool) error {
	a, err := s.start()
	if err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var once sync.Once
	var answered time.Time
	var wg sync.WaitGroup
	began := time.Now()
	if err := s.register(a); err != nil {
		return err
	}
	for range pollers {
		wg.Go(func() {
			for waiting.Err() == nil {
				if name, err := s.ask(waiting); err == nil && name == a.name {
					once.Do(func() { answered = time.Now(); cancel() })
				}
			}
		})
	}
	wg.Wait()
	if answered.IsZero() {
		return errors.New(a.name + " has not answered within 10 s")
	}
	if measured {
		s.took = append(s.took, answered.Sub(began))
	}
	old := s.apps[0]
	s.apps = s.apps[1:]
	if err := s.b.client.Agent().ServiceDeregister(old.name); err != nil {
		return err
	}
	pause(ctx, settled)
	return s.retire(ctx, old)
}

// retire ends an instance that has been deregistered, gracefully.
func (s *side) retire(ctx context.Context, a *app) error {
	grace, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return a.server.Shutdown(grace)
}

// kill ends an instance outright: its connections break.
func (s *side) kill() (*app, error) {
	a := s.apps[0]
	s.apps = s.apps[1:]
	return a, a.server.Close()
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

func portText(n int) string { return "127.0.0.1:" + strconv.Itoa(n) }
