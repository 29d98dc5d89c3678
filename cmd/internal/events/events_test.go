package events

import (
	"fmt"
	"testing"
	"time"
)

// clock is a time that a test moves.
type clock struct{ now time.Time }

func (c *clock) time() time.Time { return c.now }

func newLog() (*Log, *clock, *[]time.Duration) {
	c := &clock{time.Unix(1_800_000_000, 0)}
	var took []time.Duration
	return New(c.time, func(d time.Duration) { took = append(took, d) }), c, &took
}

func TestReceipts(t *testing.T) {
	l, c, took := newLog()
	_, sub := l.Subscribe(0)
	defer sub.Close()
	seen := c.now
	c.now = c.now.Add(2 * time.Millisecond)
	l.Add(Change(InstanceAdded, "acme", "shop", "a", "here", seen, 7), Fact(ProxyConnected, "node~h1", ""))
	l.Progress(6, 6) // an older Snapshot
	c.now = c.now.Add(time.Millisecond)
	l.Progress(7, 6)
	c.now = c.now.Add(3 * time.Millisecond)
	l.Progress(9, 8)
	list := l.List(0, 10, nil)
	if len(list) != 2 || list[1].Seq <= list[0].Seq {
		t.Fatalf("list %+v", list)
	}
	s := list[0].Steps
	if *s.Built != 0.002 || *s.Pushed != 0.003 || *s.Acked != 0.006 || len(*took) != 1 || (*took)[0] != 6*time.Millisecond {
		t.Errorf("built %v pushed %v acked %v, histogram %v", *s.Built, *s.Pushed, *s.Acked, *took)
	}
	want := []struct {
		kind    string
		receipt bool
	}{{InstanceAdded, false}, {ProxyConnected, false}, {InstanceAdded, true}}
	for _, w := range want {
		if m := <-sub.C(); m.Event.Kind != w.kind || m.Receipt != w.receipt {
			t.Errorf("message %+v, want %+v", m, w)
		}
	}
}

// TestExpire: a change that a proxy still owes has its receipt after a while,
// without the missing steps.
func TestExpire(t *testing.T) {
	l, c, _ := newLog()
	_, sub := l.Subscribe(0)
	defer sub.Close()
	l.Add(Change(InstanceAdded, "acme", "shop", "a", "", c.now, 7))
	<-sub.C()
	l.Expire(10 * time.Second)
	if len(sub.C()) != 0 {
		t.Fatal("a receipt before its time")
	}
	c.now = c.now.Add(11 * time.Second)
	l.Expire(10 * time.Second)
	if m := <-sub.C(); !m.Receipt || m.Event.Steps.Acked != nil {
		t.Errorf("message %+v", m)
	}
}

func TestResumeAndGap(t *testing.T) {
	l, _, _ := newLog()
	for range keep + keep/5 {
		l.Add(Fact(SourceStale, "", ""))
	}
	all := l.List(0, keep*2, nil)
	if len(all) != keep {
		t.Fatalf("%d kept, want %d", len(all), keep)
	}
	past, sub := l.Subscribe(all[keep-3].Seq)
	sub.Close()
	if len(past) != 2 || past[0].Gap || past[0].Event.Seq != all[keep-2].Seq {
		t.Errorf("resumed with %+v", past)
	}
	past, sub = l.Subscribe(all[0].Seq - 100)
	sub.Close()
	if len(past) != keep+1 || !past[0].Gap {
		t.Errorf("resumed before what is kept: %d messages, the first %+v", len(past), past[0])
	}
	if got := l.List(all[5].Seq, 3, nil); len(got) != 3 || got[0].Seq != all[6].Seq {
		t.Errorf("after the sixth: %+v", got)
	}
	if got := l.List(0, 2, nil); len(got) != 2 || got[1].Seq != all[keep-1].Seq {
		t.Errorf("the newest two: %+v", got)
	}
}

// TestSlowReader: one that does not read loses messages and is told; nobody
// waits for it.
func TestSlowReader(t *testing.T) {
	l, _, _ := newLog()
	_, sub := l.Subscribe(0)
	defer sub.Close()
	for range subscriberQueue + 1 {
		l.Add(Fact(SourceStale, "", ""))
	}
	if !sub.Lost() || sub.Lost() {
		t.Error("the loss is not told once")
	}
}

// TestSeqGrowsOverRestarts: a Log made later begins above an earlier one's last.
func TestSeqGrowsOverRestarts(t *testing.T) {
	l, c, _ := newLog()
	l.Add(Fact(SourceStale, "", ""))
	c.now = c.now.Add(time.Second)
	later := New(c.time, nil)
	later.Add(Fact(SourceStale, "", ""))
	if a, b := l.List(0, 1, nil)[0].Seq, later.List(0, 1, nil)[0].Seq; b <= a {
		t.Errorf("%d after a restart, was %d", b, a)
	}
}

// TestAcked: a receipt names the proxies that confirmed the change itself, not
// those that had something else, or an older Snapshot of it.
func TestAcked(t *testing.T) {
	l, c, _ := newLog()
	l.Acked("node~early", 9, []string{"shop.acme:http"}) // nothing is owed
	l.Add(Change(InstanceAdded, "acme", "shop", "a", "", c.now, 7).From("consul", 812))
	l.Acked("node~h1", 7, []string{"api.acme:http"})
	l.Acked("node~h2", 6, []string{"shop.acme:http"})
	before := l.List(0, 1, nil)[0]
	l.Acked("node~h3", 8, []string{"api.acme:http", "shop.acme:http@v1"})
	l.Acked("node~h3", 9, []string{"shop.acme:http"})
	for i := range ackers {
		l.Acked(fmt.Sprint("node~n", i), 7, []string{"shop.acme:grpc"})
	}
	l.Progress(9, 9)
	l.Acked("node~late", 9, []string{"shop.acme:http"})
	e := l.List(0, 1, nil)[0]
	if *e.Source != "consul" || *e.Index != 812 || e.Acks != ackers+1 || len(e.AckedBy) != ackers || e.AckedBy[0] != "node~h3" || e.AckedBy[1] != "node~n0" {
		t.Errorf("source %v %v, %d acks: %v", *e.Source, *e.Index, e.Acks, e.AckedBy)
	}
	if before.Acks != 0 || len(before.AckedBy) != 0 {
		t.Errorf("a list that was handed out has changed: %+v", before)
	}
}

// TestLateReceipt: what comes after the receipt was sent is in the list, and no
// second receipt is sent.
func TestLateReceipt(t *testing.T) {
	l, c, _ := newLog()
	_, sub := l.Subscribe(0)
	defer sub.Close()
	l.Add(Change(InstanceAdded, "acme", "shop", "a", "", c.now, 7))
	<-sub.C()
	c.now = c.now.Add(11 * time.Second)
	l.Expire(10 * time.Second)
	if m := <-sub.C(); !m.Receipt || m.Event.Steps.Acked != nil {
		t.Errorf("message %+v", m)
	}
	l.Expire(10 * time.Second)
	c.now = c.now.Add(time.Second)
	l.Progress(7, 7)
	if e := l.List(0, 1, nil)[0]; e.Steps.Acked == nil || *e.Steps.Acked != 12 || len(sub.C()) != 0 {
		t.Errorf("event %+v, %d more messages", e.Steps, len(sub.C()))
	}
}
