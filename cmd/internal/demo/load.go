package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// phase says what answers are right during a step.
type phase int

const (
	phaseUp   phase = iota // every request is answered by an instance
	phaseDown              // or, for the shop, by a clear 503 that names the reason
)

const (
	requestTimeout = 5 * time.Second
	betweenGETs    = 2 * time.Millisecond
	betweenDials   = 20 * time.Millisecond
	waitPoll       = 20 * time.Millisecond
)

// seen is one answer.
type seen struct {
	at           time.Time
	body, reason string
	status       int
}

// load sends requests through the addresses until it is stopped: GETs over
// kept-alive connections to the shop's own address and through the gateway, and
// TCP connections to the database.
type load struct {
	targets []string // host:port of the shop, of the gateway, of the database
	client  *http.Client
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu       sync.Mutex
	phase    phase
	requests int
	failed   int
	bad      string        // the first failure
	watch    chan struct{} // closed when match has been seen
	match    func(seen) bool
	found    time.Time
}

func newLoad(shop, gateway, db string) *load {
	return &load{targets: []string{shop, gateway, db}, client: &http.Client{Timeout: requestTimeout, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}}
}

func (l *load) get(ctx context.Context, target, host string) (seen, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+target+"/", nil)
	if err != nil {
		return seen{}, err
	}
	req.Host = host
	res, err := l.client.Do(req)
	if err != nil {
		return seen{}, err
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	return seen{time.Now(), string(data), res.Header.Get("x-roost-reason"), res.StatusCode}, err
}

func (l *load) tcp(ctx context.Context) (seen, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.targets[2])
	if err != nil {
		return seen{}, err
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return seen{}, err
	}
	data, err := io.ReadAll(conn)
	if err == nil && len(data) == 0 {
		err = errors.New("closed without an answer")
	}
	return seen{time.Now(), string(data), "", http.StatusOK}, err
}

// wait returns when every target has answered once.
func (l *load) wait(ctx context.Context, limit time.Duration) error {
	return poll(ctx, limit, func() error {
		for _, t := range l.targets[:2] {
			o, err := l.get(ctx, t, hostOf(t, l.targets[1]))
			if err == nil && o.status != http.StatusOK {
				err = fmt.Errorf("%s answers %d %s", t, o.status, o.body)
			}
			if err != nil {
				return err
			}
		}
		_, err := l.tcp(ctx)
		return err
	})
}

func hostOf(target, gateway string) string {
	if target == gateway {
		return "shop.example.com"
	}
	return ""
}

func (l *load) start(ctx context.Context) {
	ctx, l.cancel = context.WithCancel(ctx)
	for _, t := range []string{l.targets[0], l.targets[0], l.targets[0], l.targets[1]} {
		l.wg.Go(func() {
			l.loop(ctx, betweenGETs, func() (seen, error) { return l.get(ctx, t, hostOf(t, l.targets[1])) })
		})
	}
	l.wg.Go(func() { l.loop(ctx, betweenDials, func() (seen, error) { return l.tcp(ctx) }) })
}

func (l *load) loop(ctx context.Context, between time.Duration, ask func() (seen, error)) {
	tick := time.NewTicker(between)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		o, err := ask()
		if ctx.Err() != nil {
			return
		}
		l.note(o, err)
	}
}

func (l *load) note(o seen, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests++
	down := l.phase == phaseDown && o.status == http.StatusServiceUnavailable && (o.reason == "no_endpoint" || o.reason == "no_healthy_endpoint")
	if err != nil || o.status != http.StatusOK && !down {
		l.failed++
		if l.bad == "" {
			l.bad = fmt.Sprintf("%d %s %v", o.status, o.body, err)
		}
		return
	}
	if l.match != nil && l.match(o) {
		l.match, l.found = nil, o.at
		close(l.watch)
	}
}

// begin starts counting anew.
func (l *load) begin(p phase) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.phase, l.requests, l.failed, l.bad = p, 0, 0, ""
}

// until returns when the first answer that matches was seen.
func (l *load) until(ctx context.Context, _ time.Time, limit time.Duration, match func(seen) bool) (time.Time, error) {
	l.mu.Lock()
	l.match, l.watch = match, make(chan struct{})
	watch := l.watch
	l.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-watch:
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.found, nil
	case <-timer.C:
		return time.Time{}, fmt.Errorf("not seen within %s", limit)
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

// end returns what was counted since begin.
func (l *load) end() (requests, failed int, bad string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.requests, l.failed, l.bad
}

func (l *load) stop() {
	if l.cancel != nil {
		l.cancel()
	}
	l.wg.Wait()
	l.client.CloseIdleConnections()
}
