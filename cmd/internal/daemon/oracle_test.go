package daemon

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/lb/ledger"
)

const (
	oracleRuns  = 120 // $ROOST_ORACLE_RUNS has another number
	oracleSteps = 500 // of one run, about
)

// TestOracle: from create to delete a service's name, internal address and
// dedicated IP never change, whatever happens to instances, Consul, Envoys or
// Roost itself. After delete, an address reaches nobody until nobody can still
// hold it. At no time does an address that was told to a caller for one service
// reach another.
//
// The reconciler, the ledger with its files, lb.Build, envoy.Translate and
// dns.Resolve are the real ones; the clock, instances, Envoys and callers are
// not. Envoys are worse than real ones: what they are sent arrives in any order.
// A caller's answer holds through every proxy that lives, not only its own.
//
// That it bites was tried by breaking Roost:
//   - free without waiting for holders: "198.51.100.3 was told as acme/s4, and
//     reaches an instance of acme/s0 through gateway~3"
//   - free without waiting for the TTL: "fd00:1::7 was told as globex/s1, and
//     reaches an instance of acme/s3 through node~2"
//   - forget the journal: "127.128.0.4 of acme/s1 was free at once"
//   - give what is quarantined to others: "198.51.100.3 went from acme/s0 to
//     globex/s2 at once"
//   - drop services on an empty catalog: "service acme/s1 exists: false;
//     declared false, recorded true"
func TestOracle(t *testing.T) {
	runs := oracleRuns
	if n, err := strconv.Atoi(os.Getenv("ROOST_ORACLE_RUNS")); err == nil {
		runs = n
	}
	given := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for name, value := range map[string]int{"rapid.checks": runs, "rapid.steps": oracleSteps} {
		f := flag.Lookup(name)
		if was := f.Value.String(); !given[name] {
			if err := f.Value.Set(strconv.Itoa(value)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Value.Set(was) })
		}
	}
	base := oracleDir(t)
	var seen tally
	rapid.Check(t, func(rt *rapid.T) {
		root, err := os.MkdirTemp(base, "world-")
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(root) }()
		w := randomWorld(rt, root, &seen)
		defer w.close()
		actions := w.actions()
		actions[""] = func(*rapid.T) { seen.steps++; w.checkCalls() }
		rt.Repeat(actions)
		w.settle()
	})
	t.Logf("%+v", seen)
	if runs >= oracleRuns && min(seen.again, seen.reused, seen.freed, seen.healed, seen.reached, seen.forgotten) == 0 {
		t.Errorf("something has never happened: %+v", seen)
	}
}

// oracleDir is a directory in memory where there is one: thousands of writes are
// flushed.
func oracleDir(t *testing.T) string {
	const memory = "/dev/shm"
	if info, err := os.Stat(memory); err != nil || !info.IsDir() {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(memory, "roost-oracle-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// actions are what can happen, the frequent ones several times.
func (w *world) actions() map[string]func(*rapid.T) {
	all := map[string]func(*rapid.T){}
	for name, a := range map[string]struct {
		times int
		f     func()
	}{
		"put": {5, w.doPut}, "delete": {5, w.doDelete}, "create again": {1, w.doAgain}, "declare": {2, w.doDeclare}, "ttl": {1, w.doTTL},
		"start instance": {5, w.doStart}, "stop instance": {2, w.doStop}, "move instance": {2, w.doMove}, "scale to zero": {1, w.doZero},
		"wipe Consul": {1, w.doWipe}, "Consul is back": {4, w.doUnwipe}, "die": {1, w.doDie}, "revive": {6, w.doRevive}, "back up": {1, w.doBackup}, "restore": {1, w.doRestore},
		"disk is full": {1, w.doFull}, "disk has room": {4, w.doRoom}, "die while writing": {1, w.doDieWriting}, "pass": {8, w.doPass},
		"proxy comes": {3, w.doArrive}, "proxy lags": {6, w.doLag}, "proxy keeps up": {6, w.doKeepUp}, "removals stick": {3, w.doStick}, "proxy is cut off": {1, w.doCut}, "proxy is back": {5, w.doBack}, "refuse": {1, w.doRefuse},
		"ask": {10, w.doAsk},
	} {
		for n := range a.times {
			all[name+" "+strconv.Itoa(n)] = func(*rapid.T) { a.f() }
		}
	}
	return all
}

func (w *world) key() lb.Key { return rapid.SampledFrom(oracleKeys).Draw(w.chance, "key") }

func (w *world) body() string {
	body := rapid.SampledFrom(oracleBodies).Draw(w.chance, "body")
	if rapid.Bool().Draw(w.chance, "dedicated") {
		body = withDedicated(body)
	}
	return body
}

func (w *world) doPut() {
	if w.r != nil {
		w.put(w.key(), w.body())
	}
}

func (w *world) doDelete() {
	if w.r == nil {
		return
	}
	key := w.key()
	if rapid.IntRange(0, 3).Draw(w.chance, "instances too") > 0 {
		w.change(slices.DeleteFunc(slices.Clone(w.instances), func(i discovery.Instance) bool { return i.Key == key }))
	}
	w.remove(key)
}

// doAgain creates one again whose address waits.
func (w *world) doAgain() {
	if w.r == nil {
		return
	}
	for _, r := range some(w.chance, w.records, "again") {
		if r.State == ledger.Quarantined {
			w.put(keyOf(r.Owner), w.body())
			return
		}
	}
}

func (w *world) doDeclare() {
	key := w.key()
	var before []ledger.Record
	if _, ok := w.model.declared[key]; ok {
		delete(w.model.declared, key)
	} else {
		w.model.declared[key] = w.body()
		before = w.quarantined(key)
	}
	w.t.Logf("declare %s: %s", key, w.model.declared[key])
	if w.r != nil {
		w.reload()
		w.sameAgain(key, before)
	}
}

func (w *world) doTTL() {
	w.ttl = time.Duration(rapid.IntRange(1, 12).Draw(w.chance, "ttl")) * time.Second
	w.t.Logf("ttl %s", w.ttl)
	w.reload()
}

// change is news of the instances.
func (w *world) change(instances []discovery.Instance) {
	w.instances = instances
	w.collect()
	if w.r != nil {
		w.build()
	}
}

func (w *world) place(i *discovery.Instance) {
	w.started++
	i.Address = instanceAddress(i.Key, w.started)
	i.Node = "h" + strconv.Itoa(w.started%3)
}

func (w *world) doStart() {
	i := discovery.Instance{Key: w.key(), Weight: 1, Health: discovery.Passing, Source: SourceConsul, Ports: []discovery.Port{{Number: 9000}}}
	w.place(&i)
	i.ID = "i" + strconv.Itoa(w.started)
	i.Origin = "consul:" + i.Node + "/" + i.ID
	if rapid.IntRange(0, 3).Draw(w.chance, "wants") == 0 {
		i.Wants = []discovery.WantedPort{{Name: "a", Dial: 80, Protocol: lb.TCP}}
	}
	w.t.Logf("start %s %s", i.Name(), i.Address)
	w.change(append(slices.Clone(w.instances), i))
}

func (w *world) doStop() {
	if n := len(w.instances); n > 0 {
		at := rapid.IntRange(0, n-1).Draw(w.chance, "stopped")
		w.change(slices.Delete(slices.Clone(w.instances), at, at+1))
	}
}

func (w *world) doMove() {
	if n := len(w.instances); n > 0 {
		next := slices.Clone(w.instances)
		w.place(&next[rapid.IntRange(0, n-1).Draw(w.chance, "moved")])
		w.change(next)
	}
}

func (w *world) doZero() {
	key := w.key()
	w.change(slices.DeleteFunc(slices.Clone(w.instances), func(i discovery.Instance) bool { return i.Key == key }))
}

func (w *world) doWipe() {
	w.t.Logf("Consul is wiped")
	w.wiped = true
	w.change(w.instances)
}

func (w *world) doUnwipe() {
	if w.wiped {
		w.wiped = false
		w.change(w.instances)
	}
}

// seldom is for what would leave no time for anything else.
func (w *world) seldom() bool { return rapid.IntRange(0, 3).Draw(w.chance, "seldom") == 0 }

func (w *world) doDie() {
	if w.r != nil && w.seldom() {
		w.t.Logf("Roost dies")
		w.die()
	}
}

// doRevive starts Roost, or lets its sources answer.
func (w *world) doRevive() {
	switch {
	case w.r == nil:
		w.known = rapid.Bool().Draw(w.chance, "known")
		w.collect()
		w.t.Logf("Roost starts, its sources known: %v", w.known)
		w.start()
	case !w.known:
		w.known = true
		w.change(w.instances)
	}
}

func (w *world) doBackup() {
	path := filepath.Join(w.root, "backup"+strconv.Itoa(len(w.backups)%4))
	w.copyFile(filepath.Join(w.dir, ledgerFile), path)
	w.backups = append(w.backups, path)
}

func (w *world) doRestore() {
	if w.r == nil && len(w.backups) > 0 {
		w.t.Logf("an old backup is put back")
		w.copyFile(rapid.SampledFrom(w.backups).Draw(w.chance, "backup"), filepath.Join(w.dir, ledgerFile))
	}
}

func (w *world) doFull() {
	if w.r != nil {
		w.t.Logf("the disk is full")
		w.disk.mode = writeFull
	}
}

func (w *world) doRoom() {
	if w.r != nil {
		w.disk.mode = writeWell
	}
}

func (w *world) doDieWriting() {
	if w.r == nil || !w.seldom() {
		return
	}
	w.disk.mode, w.unsure = writeDying, true
	if rapid.Bool().Draw(w.chance, "of a delete") {
		w.remove(w.key())
	} else {
		w.put(w.key(), w.body())
	}
	w.t.Logf("Roost dies while it writes")
	w.die()
}

func (w *world) doPass() {
	longest := rapid.SampledFrom([]int{100, 1000, 2000, 5000, 20000}).Draw(w.chance, "longest")
	d := time.Duration(rapid.IntRange(1, longest).Draw(w.chance, "passed")) * time.Millisecond
	w.t.Logf("%s pass", d)
	w.pass(d)
}

const oracleProxies = 6

func (w *world) doArrive() {
	if w.r != nil && w.r.served && len(w.proxies) < oracleProxies {
		w.arrive(rapid.SampledFrom([]lb.Role{lb.Node, lb.Sidecar, lb.Gateway}).Draw(w.chance, "role"))
	}
}

// proxy draws one for which ok holds.
func (w *world) proxy(ok func(*proxy) bool) *proxy {
	var list []*proxy
	for _, p := range w.proxies {
		if ok(p) {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return rapid.SampledFrom(list).Draw(w.chance, "proxy")
}

// doLag takes one proxy a step further: it says what it has, is sent something,
// gets it, answers.
func (w *world) doLag() {
	p := w.proxy(func(p *proxy) bool { return p.linked })
	if p == nil {
		return
	}
	if !p.conn.started {
		p.say()
	}
	for range rapid.IntRange(1, 4).Draw(w.chance, "rounds") {
		p.send(w, false)
		p.deliver(w, false)
	}
}

// doKeepUp gives one proxy all that it is owed.
func (w *world) doKeepUp() {
	if p := w.proxy(func(p *proxy) bool { return p.linked }); p != nil {
		p.catchUp(w)
	}
}

// doStick keeps removals from one proxy, or lets them through again.
func (w *world) doStick() {
	if p := w.proxy(func(p *proxy) bool { return p.linked }); p != nil {
		p.stuck = !p.stuck
	}
}

// doCut ends a link, sometimes for ever; the server notices now or later.
func (w *world) doCut() {
	p := w.proxy(func(p *proxy) bool { return p.linked || p.conn != nil && p.conn.connected })
	if p == nil {
		return
	}
	p.cut(w)
	p.lost = p.lost || rapid.IntRange(0, 3).Draw(w.chance, "for ever") == 0
	if rapid.Bool().Draw(w.chance, "noticed") {
		p.noticed(w)
	}
	w.t.Logf("%s is cut off, for ever %v, noticed %v", p.id, p.lost, !p.ends.IsZero())
}

func (w *world) doBack() {
	if w.r == nil || !w.r.served {
		return
	}
	if p := w.proxy(func(p *proxy) bool { return !p.linked && !p.lost }); p != nil {
		w.t.Logf("%s is back", p.id)
		p.link(w)
	}
}

func (w *world) doRefuse() {
	if p := w.proxy(func(p *proxy) bool { return p.linked }); p != nil {
		p.refuse(w)
	}
}

// doAsk is a caller that asks DNS, or a person who asks the API.
func (w *world) doAsk() {
	if w.r == nil {
		return
	}
	s := w.d.snapshot.Load()
	if len(s.Order) == 0 {
		return
	}
	key := rapid.SampledFrom(s.Order).Draw(w.chance, "asked").Key
	if rapid.IntRange(0, 3).Draw(w.chance, "API") == 0 {
		svc := s.Services.Get(key)
		for _, a := range []netip.Addr{svc.Address, svc.Address6, svc.Dedicated} {
			w.tell(key, a, s.Config.TTL)
		}
		return
	}
	// The answer takes a while to arrive, and its time counts from then.
	late := time.Duration(rapid.IntRange(0, 1900).Draw(w.chance, "late")) * time.Millisecond
	for _, rr := range ask(s, rapid.SampledFrom(oracleViews).Draw(w.chance, "view"), key) {
		if a, err := netip.ParseAddr(rr.Data); err == nil {
			w.tell(key, a, time.Duration(rr.TTL)*time.Second+late)
		}
	}
}

func (w *world) tell(key lb.Key, a netip.Addr, holds time.Duration) {
	if until := w.now.Add(holds); a.IsValid() && until.After(w.told[answer{key, a}]) {
		w.told[answer{key, a}] = until
	}
}

// settle is the end of a run: when everything has arrived and the time is over,
// no address waits any more, and a service waits only for a pool that is full.
func (w *world) settle() {
	if w.r == nil {
		w.doRevive()
	}
	w.disk.mode, w.known = writeWell, true
	w.change(w.instances)
	for range 3 {
		for _, p := range w.proxies {
			switch {
			case p.lost:
				p.cut(w)
				p.noticed(w)
				continue
			case !p.linked:
				p.link(w)
			}
			p.stuck = false
			p.catchUp(w)
		}
		w.pass(w.quarantine + 12*time.Second + ttlMargin + 3*tickEvery)
		w.checkCalls()
	}
	const room, room6, roomDedicated = 6, 7, 6
	used := map[string]int{}
	for _, r := range w.records {
		if r.State != ledger.Bound {
			w.t.Fatalf("never free again: %+v", r)
		}
		used[r.Pool]++
	}
	for _, s := range w.d.snapshot.Load().Order {
		if !s.Address.IsValid() && used[oraclePools[0].String()] < room || !s.Address6.IsValid() && used[oraclePools[1].String()] < room6 ||
			s.Spec.DedicatedPool != "" && !s.Dedicated.IsValid() && used[oracleDedicated.Name] < roomDedicated {
			w.t.Fatalf("%s waits for an address although there is room: %v", s.Key, used)
		}
	}
}
