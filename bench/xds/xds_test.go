package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestMain lets the test's binary be a server, as the bench's own is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "-serve" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// TestQuick runs every part small: the bench itself fails where a change does
// not reach every proxy, and each figure says something.
func TestQuick(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	o := options{output: "json", parts: "change,pipeline,flapping,allocs", each: 3, budget: time.Second}
	var out bytes.Buffer
	if _, err := run(ctx, o.small(), &out); err != nil {
		t.Fatal(err)
	}
	var got struct{ Figures []figure }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	both := 0
	for _, f := range got.Figures {
		if f.Roost <= 0 {
			t.Errorf("%s is %v", f.Name, f.Roost)
		}
		if f.Peer > 0 {
			both++
		}
	}
	if len(got.Figures) != 22 || both != 12 {
		t.Errorf("%d figures, %d of both sides", len(got.Figures), both)
	}
}
