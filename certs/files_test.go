package certs

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair writes a certificate and its key; other is a key that does not fit.
func pair(t *testing.T, dir string, serial int64, from, until time.Time, other bool) File {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: from, NotAfter: until, DNSNames: []string{"Shop.Example.com", "*.example.com"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if other {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	f := File{filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key")}
	for path, block := range map[string]*pem.Block{f.CertFile: {Type: "CERTIFICATE", Bytes: der}, f.KeyFile: {Type: "EC PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(path+".new", pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestWhatIsWrongIsSaid: each way in which a file can be bad, at the first read
// and after a good one.
func TestWhatIsWrongIsSaid(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name, says    string
		from, until   time.Time
		other         bool
		spoil         func(File) error
		served, first bool // whether it is served although a good one was, or none was, there before
	}{
		{name: "good", from: now.Add(-time.Hour), until: now.Add(90 * 24 * time.Hour), served: true, first: true},
		{name: "expired", says: "it has expired on", from: now.Add(-2 * time.Hour), until: now.Add(-time.Hour), first: true},
		{name: "not yet valid", says: "it is not valid before", from: now.Add(time.Hour), until: now.Add(90 * 24 * time.Hour), first: true},
		{name: "expires soon", says: "it expires on", from: now.Add(-time.Hour), until: now.Add(time.Hour), served: true, first: true},
		{name: "foreign key", says: "private key does not match public key", from: now.Add(-time.Hour), until: now.Add(90 * 24 * time.Hour), other: true},
		{name: "junk", says: "no PEM block in it", from: now.Add(-time.Hour), until: now.Add(90 * 24 * time.Hour), spoil: func(f File) error { return os.WriteFile(f.CertFile, []byte("junk"), 0o600) }},
		{name: "no key", says: "no such file", from: now.Add(-time.Hour), until: now.Add(90 * 24 * time.Hour), spoil: func(f File) error { return os.Remove(f.KeyFile) }},
	} {
		for _, before := range []bool{false, true} {
			dir := t.TempDir()
			files := NewFiles(slog.New(slog.DiscardHandler), nil)
			if before {
				files.Want([]Want{{File: pair(t, dir, 1, now.Add(-time.Hour), now.Add(99*24*time.Hour), false)}})
			}
			f := pair(t, dir, 2, c.from, c.until, c.other)
			if c.spoil != nil {
				if err := c.spoil(f); err != nil {
					t.Fatal(err)
				}
			}
			files.Want([]Want{{File: f, Origin: "roost.yaml:3:4"}})
			serial := int64(0)
			if p := files.Pairs()[f]; p != nil {
				serial = p.Leaf.SerialNumber.Int64()
			}
			want := int64(0)
			switch {
			case before && c.served, !before && c.first:
				want = 2
			case before:
				want = 1 // the last good one
			}
			if serial != want {
				t.Errorf("%s (a good one before: %v): certificate %d is served, want %d", c.name, before, serial, want)
			}
			problems := files.Problems()
			if c.says == "" != (len(problems) == 0) || c.says != "" && (!strings.Contains(problems[0].Err.Error(), c.says) || problems[0].Origin != "roost.yaml:3:4") {
				t.Errorf("%s: problems %+v, want %q", c.name, problems, c.says)
			}
		}
	}
}

// TestRenewal: a pair that is replaced is noticed without being asked for.
func TestRenewal(t *testing.T) {
	dir, far := t.TempDir(), time.Now().Add(90*24*time.Hour)
	files := NewFiles(slog.New(slog.DiscardHandler), nil)
	f := pair(t, dir, 1, time.Now().Add(-time.Hour), far, false)
	files.Want([]Want{{File: f}})
	if names := files.Pairs()[f].Names; len(names) != 2 || names[0] != "*.example.com" || names[1] != "shop.example.com" {
		t.Errorf("names %v", names)
	}
	<-files.Changed()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	done := make(chan error, 1)
	go func() { done <- files.Run(ctx) }()
	pair(t, dir, 2, time.Now().Add(-time.Hour), far, false)
	for files.Pairs()[f].Leaf.SerialNumber.Int64() != 2 {
		select {
		case <-files.Changed():
		case <-ctx.Done():
			t.Fatal("the renewed pair is not seen")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
