package admin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/roostmesh/roost/cmd/internal/events"
)

const (
	eventsPath    = "/api/v1/events"
	heartbeat     = 15 * time.Second
	streamTimeout = 10 * time.Second // for one write
)

// stream serves the events as Server-Sent Events where they are asked for.
func (a *api) stream(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != eventsPath || r.Method != http.MethodGet || !strings.Contains(r.Header.Get("Accept"), "text/event-stream") {
			next.ServeHTTP(w, r)
			return
		}
		after := uint64(0)
		for _, v := range []string{r.URL.Query().Get("after"), r.Header.Get("Last-Event-ID")} {
			if v == "" {
				continue
			}
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				problem(w, http.StatusBadRequest, fmt.Sprintf("%q is no sequence number", v))
				return
			}
			after = n
		}
		past, sub := a.d.Events.Subscribe(after)
		defer sub.Close()
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Cache-Control", "no-store")
		out := sseWriter{w, http.NewResponseController(w)}
		if out.write(": events of roost\n\n") != nil {
			return
		}
		for _, m := range past {
			if out.message(m) != nil {
				return
			}
		}
		tick := time.NewTicker(heartbeat)
		defer tick.Stop()
		for {
			var err error
			select {
			case <-r.Context().Done():
				return
			case m := <-sub.C():
				if sub.Lost() {
					err = out.message(events.Message{Gap: true})
				}
				if err == nil {
					err = out.message(m)
				}
			case <-tick.C:
				err = out.write(": still here\n\n")
			}
			if err != nil {
				return
			}
		}
	})
}

type sseWriter struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (o sseWriter) write(s string) error {
	if err := o.c.SetWriteDeadline(time.Now().Add(streamTimeout)); err != nil {
		return err
	}
	if _, err := o.w.Write([]byte(s)); err != nil {
		return err
	}
	return o.c.Flush()
}

func (o sseWriter) message(m events.Message) error {
	if m.Gap {
		return o.write("event: gap\ndata: {}\n\n")
	}
	data, err := json.Marshal(m.Event)
	if err != nil {
		return err
	}
	kind := m.Event.Kind
	if m.Receipt {
		kind = "receipt"
	}
	return o.write(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", m.Event.Seq, kind, data))
}
