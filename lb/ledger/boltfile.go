package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"

	bolt "go.etcd.io/bbolt"
)

// create makes a ledger where there is none. It comes into being whole: a crash
// at the first start leaves no file that looks like a damaged ledger.
func create(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil // what it is, is checkFile's to say
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := bolt.Open(f.Name(), 0o600, nil)
	if err != nil {
		return err
	}
	if err := errors.Join(db.Update(prepare), db.Close()); err != nil {
		return err
	}
	// A link, unlike a rename, never replaces what another process has made.
	err = os.Link(f.Name(), path)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		err = os.Rename(f.Name(), path) // a file system without links
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// The parts of a bbolt file that say how long it must be: two meta pages, of
// which the newer valid one counts, each a page header and a meta.
const (
	boltMagic      = 0xED0CDAED
	pageHeader     = 16
	metaPageSize   = 8  // offset in the meta
	metaHighWater  = 40 // pages in use
	metaTxid       = 48
	metaChecksum   = 56
	metaLength     = 64
	smallestPage   = 1024
	largestPage    = 65536
	defaultMinimum = 2 * smallestPage
)

// checkFile finds out whether a file is a whole bbolt database before bbolt maps
// it into memory: reading behind the end of a mapped file kills the process.
func checkFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is not a file")
	case info.Size() < defaultMinimum:
		return fmt.Errorf("it is cut off: it has %d bytes", info.Size())
	}
	page, highWater, txid := uint64(0), uint64(0), uint64(0)
	for size := int64(smallestPage); size <= largestPage; size *= 2 {
		for _, at := range []int64{0, size} {
			m, ok := readMeta(f, at)
			if ok && m.pageSize == uint64(size) && (page == 0 || m.txid > txid) {
				page, highWater, txid = m.pageSize, m.highWater, m.txid
			}
		}
	}
	if page == 0 {
		return errors.New("it is not a ledger, or its beginning is damaged")
	}
	if need := highWater * page; uint64(info.Size()) < need {
		return fmt.Errorf("it is cut off: it has %d bytes of %d", info.Size(), need)
	}
	return nil
}

type boltMeta struct{ pageSize, highWater, txid uint64 }

func readMeta(f io.ReaderAt, at int64) (boltMeta, bool) {
	b := make([]byte, metaLength)
	if _, err := f.ReadAt(b, at+pageHeader); err != nil {
		return boltMeta{}, false
	}
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaChecksum])
	n := binary.NativeEndian
	if n.Uint32(b) != boltMagic || n.Uint64(b[metaChecksum:]) != sum.Sum64() {
		return boltMeta{}, false
	}
	return boltMeta{uint64(n.Uint32(b[metaPageSize:])), n.Uint64(b[metaHighWater:]), n.Uint64(b[metaTxid:])}, true
}

// errDamaged is what a panic of bbolt, which is how it meets a damaged page, or
// a fault of the mapped file becomes.
var errDamaged = errors.New("the file is damaged")

func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}
