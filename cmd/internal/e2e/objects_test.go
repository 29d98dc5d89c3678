package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// answer is what the admin API said.
type answer struct {
	status int
	etag   string
	body   string
}

func (r *roost) ask(method, path, body string, headers ...string) answer {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, "http://"+r.args+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header.Get("ETag"), string(data)}
}

// TestConditions: a service is made once, changed only as it was read, and a
// repeat changes nothing; what is wrong with a body is pointed at.
func TestConditions(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.171.0.0/16", "services: [{name: fixed, tenant: acme, ports: [{port: 80}]}]\n")).serve()
	const path = "/api/v1/services/acme/cart"
	const body = `{"ports": [{"port": 18110, "protocol": "http"}]}`
	want := func(what string, got answer, status int, says string) answer {
		t.Helper()
		if got.status != status || !strings.Contains(got.body, says) {
			t.Errorf("%s: %d %s, want %d with %q", what, got.status, got.body, status, says)
		}
		return got
	}
	made := want("made", r.ask("PUT", path, body, "If-None-Match", "*"), 201, `"name":"cart"`)
	if made.etag == "" {
		t.Fatal("no entity tag")
	}
	want("made twice", r.ask("PUT", path, body, "If-None-Match", "*"), 412, "it exists")
	same := want("a repeat", r.ask("PUT", path, " "+body), 200, `"name":"cart"`)
	read := want("read", r.ask("GET", path, ""), 200, `"name":"cart"`)
	if same.etag != made.etag || read.etag != made.etag || same.body != made.body {
		t.Errorf("a repeat changed something: %+v, %+v, %+v", made, same, read)
	}
	changed := want("changed", r.ask("PUT", path, `{"ports": [{"port": 18111}]}`, "If-Match", made.etag), 200, "18111")
	if changed.etag == made.etag {
		t.Error("the entity tag is still the same")
	}
	want("changed from what is no more", r.ask("PUT", path, body, "If-Match", made.etag), 412, "read it again")
	want("a list of tags", r.ask("PUT", path, `{"ports": [{"port": 18112}]}`, "If-Match", `"x", `+changed.etag), 200, "18112")
	want("deleted from what is no more", r.ask("DELETE", path, "", "If-Match", made.etag), 412, "read it again")
	want("a precondition on nothing", r.ask("PUT", "/api/v1/services/acme/none", body, "If-Match", "*"), 412, "If-Match")

	want("two mistakes", r.ask("PUT", path, `{"ports": [{"port": 80, "protocol": "htp"}], "alow": []}`), 422, `"location":"/ports/0/protocol"`)
	want("two mistakes", r.ask("PUT", path, `{"ports": [{"port": 80, "protocol": "htp"}], "alow": []}`), 422, `"location":"/alow"`)
	want("no JSON", r.ask("PUT", path, `{"ports": [`), 422, "")
	if got := r.ask("GET", path, ""); !strings.Contains(got.body, "18112") {
		t.Errorf("a refused change left %s", got.body)
	}
	want("declared in a file", r.ask("PUT", "/api/v1/services/acme/fixed", body), 409, "change it at")
	want("declared in a file", r.ask("DELETE", "/api/v1/services/acme/fixed", ""), 409, "remove it at")
	want("unknown", r.ask("DELETE", "/api/v1/services/acme/none", ""), 404, "no such service")
	want("deleted", r.ask("DELETE", path, "", "If-Match", r.ask("GET", path, "").etag), 200, `"state":"quarantined"`)
	want("gone", r.ask("GET", path, ""), 404, "there is no service")
}

// TestMoveTheLedger: an export of a file's ledger, taken over into a shared one,
// keeps every address; what contradicts is refused whole.
func TestMoveTheLedger(t *testing.T) {
	c := newCatalog(t)
	from := newRoost(host{t, ""}, onLoopback(t, "127.170.0.0/29", "")).serve()
	addresses := map[string]string{}
	for i := range 4 {
		name := fmt.Sprintf("acme/s%d", i)
		from.ok("service", "create", name, "--port", "80")
		addresses[name] = from.address(name)
	}
	export := from.ok("address", "export")
	to := c.replica("h1", "").serve()
	to.file("export.json", export)
	var got struct{ Added int }
	to.json(&got, "address", "import", filepath.Join(to.dir, "export.json"))
	if got.Added != 8 {
		t.Errorf("added %d", got.Added)
	}
	for name, address := range addresses {
		to.sees(name, address)
	}
	to.json(&got, "address", "import", filepath.Join(to.dir, "export.json"))
	if got.Added != 0 {
		t.Errorf("a repeat added %d", got.Added)
	}
	var doc map[string]any
	if err := json.Unmarshal([]byte(to.ok("address", "export")), &doc); err != nil {
		t.Fatal(err)
	}

	// Somebody else has an address of the export by now.
	other := newRoost(host{t, ""}, onLoopback(t, "127.170.0.0/29", "")).serve()
	for i := range 6 {
		other.ok("service", "create", fmt.Sprintf("globex/o%d", i), "--port", "80")
	}
	other.file("export.json", export)
	code, _, errOut := other.cli("address", "import", "export.json")
	if code != 1 || !strings.Contains(errOut, "nothing was added, because an address never changes") {
		t.Errorf("a contradiction: exit %d %s", code, errOut)
	}
	if out := other.ok("addresses"); strings.Contains(out, "acme/") {
		t.Errorf("half of it was taken: %s", out)
	}
	other.file("bad.json", `{"format": "roost-ledger-export-1", "generation": 1, "recrds": []}`)
	if code, _, errOut := other.cli("address", "import", "bad.json"); code != 1 || !strings.Contains(errOut, "recrds") {
		t.Errorf("a bad file: exit %d %s", code, errOut)
	}
}
