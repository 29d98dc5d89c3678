package ledger

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterr "go.etcd.io/bbolt/errors"
)

// boltLockWait is how long a second process waits for the first to let go.
const boltLockWait = 500 * time.Millisecond

var (
	metaBucket    = []byte("meta")
	recordBucket  = []byte("records")
	objectBucket  = []byte("objects")
	markBucket    = []byte("marks")
	formatKey     = []byte("format")
	generationKey = []byte("generation")
	boltFormat    = []byte("roost-ledger-1")
)

// Bolt is a Store in one local file. Its file lock keeps a second process out.
type Bolt struct{ db *bolt.DB }

// OpenBolt opens or makes the file. The error names the path; ErrLocked is
// wrapped when another process has it. A file of another kind, or one that is cut
// off, is refused and left as it is.
//
// A file that was put back from a backup opens as what it is: what was written
// after the backup is gone, generations are given a second time, and a service
// that got its address since then may get another.
func OpenBolt(path string) (*Bolt, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, err)
	}
	if err := create(path); err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, err)
	}
	if err := checkFile(path); err != nil {
		return nil, fmt.Errorf("ledger %s: %w; restore it from a backup, or move it away to begin anew", path, err)
	}
	db, err := openDB(path)
	if errors.Is(err, bolterr.ErrTimeout) {
		return nil, fmt.Errorf("ledger %s: %w: another roost runs with this data_dir", path, ErrLocked)
	}
	if err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, err)
	}
	return &Bolt{db}, nil
}

// openDB opens an existing file and makes sure that it is a ledger.
func openDB(path string) (db *bolt.DB, err error) {
	err = guarded(func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: boltLockWait})
		return err
	})
	if err != nil {
		return nil, err
	}
	// Nothing is written where nothing is missing: a start needs no room on the disk.
	err = guarded(func() error {
		whole := false
		err := db.View(func(tx *bolt.Tx) error {
			whole = tx.Bucket(metaBucket) != nil && tx.Bucket(markBucket) != nil
			return nil
		})
		if err == nil && whole {
			return db.View(checkFormat)
		}
		return errors.Join(err, db.Update(prepare))
	})
	if err != nil {
		_ = db.Close()
		return nil, err
	}
	return db, nil
}

func checkFormat(tx *bolt.Tx) error {
	if got := tx.Bucket(metaBucket).Get(formatKey); string(got) != string(boltFormat) {
		return fmt.Errorf("its format is %q, this roost reads %q: it is of another version of roost, use that one", got, boltFormat)
	}
	return nil
}

func prepare(tx *bolt.Tx) error {
	meta := tx.Bucket(metaBucket)
	if meta == nil {
		if name, _ := tx.Cursor().First(); name != nil {
			return errors.New("it is a database of another program; set another data_dir")
		}
		var err error
		if meta, err = tx.CreateBucket(metaBucket); err != nil {
			return err
		}
		if err := meta.Put(formatKey, boltFormat); err != nil {
			return err
		}
	}
	if err := checkFormat(tx); err != nil {
		return err
	}
	for _, b := range [][]byte{recordBucket, objectBucket, markBucket} {
		if _, err := tx.CreateBucketIfNotExists(b); err != nil {
			return err
		}
	}
	return nil
}

// Load reads everything.
func (b *Bolt) Load(context.Context) (State, error) {
	var s State
	err := guarded(func() error {
		return b.db.View(func(tx *bolt.Tx) error {
			s.Generation = generation(tx)
			return errors.Join(
				readAll(tx.Bucket(recordBucket), "record", &s.Records),
				readAll(tx.Bucket(objectBucket), "service", &s.Objects),
				readAll(tx.Bucket(markBucket), "mark", &s.Marks),
			)
		})
	})
	if err != nil {
		return State{}, fmt.Errorf("ledger %s: %w: it is damaged; restore it from a backup", b.db.Path(), err)
	}
	return s, nil
}

func readAll[T any](b *bolt.Bucket, what string, out *[]T) error {
	return b.ForEach(func(k, v []byte) error {
		var t T
		if err := json.Unmarshal(v, &t); err != nil {
			return fmt.Errorf("%s %q: %w", what, k, err)
		}
		*out = append(*out, t)
		return nil
	})
}

func generation(tx *bolt.Tx) uint64 {
	v := tx.Bucket(metaBucket).Get(generationKey)
	if len(v) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// Apply writes a batch in one transaction that is on the disk when it returns.
// A context that has ended before keeps it from beginning.
func (b *Bolt) Apply(ctx context.Context, batch Batch) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := guarded(func() error {
		return b.db.Update(func(tx *bolt.Tx) error { return write(tx, batch) })
	})
	if err != nil {
		return fmt.Errorf("ledger %s: %w", b.db.Path(), err)
	}
	return nil
}

func write(tx *bolt.Tx, batch Batch) error {
	if have := generation(tx); batch.After != have || batch.Generation <= have {
		return fmt.Errorf("generation %d after %d does not follow %d: %w", batch.Generation, batch.After, have, ErrConflict)
	}
	records, objects, marks := tx.Bucket(recordBucket), tx.Bucket(objectBucket), tx.Bucket(markBucket)
	var errs []error
	for _, a := range batch.Delete {
		errs = append(errs, records.Delete(addressKey(a)))
	}
	for _, r := range batch.Put {
		errs = append(errs, putJSON(records, addressKey(r.Address), r))
	}
	for _, o := range batch.DelObjects {
		errs = append(errs, objects.Delete([]byte(o.String())))
	}
	for _, o := range batch.PutObjects {
		errs = append(errs, putJSON(objects, []byte(o.Owner.String()), o))
	}
	for _, k := range batch.DelMarks {
		errs = append(errs, marks.Delete(markID(k)))
	}
	for _, m := range batch.PutMarks {
		errs = append(errs, putJSON(marks, markID(m.Key()), m))
	}
	errs = append(errs, tx.Bucket(metaBucket).Put(generationKey, binary.BigEndian.AppendUint64(nil, batch.Generation)))
	return errors.Join(errs...)
}

func markID(k MarkKey) []byte { return []byte(k.Kind + "/" + k.Name) }

func putJSON(b *bolt.Bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put(key, data)
}

func addressKey(a netip.Addr) []byte { return []byte(a.String()) }

// Close lets go of the file.
func (b *Bolt) Close() error { return b.db.Close() }
