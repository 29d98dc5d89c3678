package demo

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// app is one little service; it answers its name.
type app struct {
	address string
	close   func()
}

// serveHTTP answers every request with the name, on a loopback address of its
// own where the host has one.
func serveHTTP(name string) (*app, error) {
	l, err := listenApp(name)
	if err != nil {
		return nil, err
	}
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, name)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // ends with Close
	}()
	return &app{l.Addr().String(), func() { _ = s.Close(); <-done }}, nil
}

// serveTCP says the name to every connection and closes it.
func serveTCP(name string) (*app, error) {
	l, err := listenApp(name)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, name)
			_ = conn.Close()
		}
	}()
	return &app{l.Addr().String(), func() { _ = l.Close(); <-done }}, nil
}

var appAddresses = map[string]int{"shop-1": 11, "shop-2": 12, "other-1": 21, "db-1": 13}

func listenApp(name string) (net.Listener, error) {
	return net.Listen("tcp", fmt.Sprintf("127.0.0.%d:0", appAddresses[name]))
}
