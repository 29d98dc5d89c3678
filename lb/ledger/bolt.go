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
	formatKey     = []byte("format")
	generationKey = []byte("generation")
	boltFormat    = []byte("roost-ledger-1")
)

// ErrLocked is wrapped when another process has the store open.
var ErrLocked = errors.New("held by another process")

// Bolt is a Store in one local file. Its file lock keeps a second process out.
type Bolt struct{ db *bolt.DB }

// OpenBolt opens or makes the file. The error names the path; ErrLocked is
// wrapped when another process has it. A file of another kind is refused and
// left as it is.
func OpenBolt(path string) (*Bolt, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("ledger %s: %w", path, err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: boltLockWait})
	if errors.Is(err, bolterr.ErrTimeout) {
		return nil, fmt.Errorf("ledger %s: %w: another roost runs with this data_dir", path, ErrLocked)
	}
	if err != nil {
		return nil, fmt.Errorf("ledger %s: %w: it is not a ledger, or damaged; restore it from a backup, or move it away to begin anew", path, err)
	}
	if err := db.Update(prepare); err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("ledger %s: %w", path, err)
	}
	return &Bolt{db}, nil
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
	if got := meta.Get(formatKey); string(got) != string(boltFormat) {
		return fmt.Errorf("its format is %q, this roost reads %q", got, boltFormat)
	}
	for _, b := range [][]byte{recordBucket, objectBucket} {
		if _, err := tx.CreateBucketIfNotExists(b); err != nil {
			return err
		}
	}
	return nil
}

// Load reads everything.
func (b *Bolt) Load(context.Context) (State, error) {
	var s State
	err := b.db.View(func(tx *bolt.Tx) error {
		s.Generation = generation(tx)
		err := tx.Bucket(recordBucket).ForEach(func(k, v []byte) error {
			var r Record
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("record %s: %w", k, err)
			}
			s.Records = append(s.Records, r)
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(objectBucket).ForEach(func(k, v []byte) error {
			var o Object
			if err := json.Unmarshal(v, &o); err != nil {
				return fmt.Errorf("service %s: %w", k, err)
			}
			s.Objects = append(s.Objects, o)
			return nil
		})
	})
	if err != nil {
		return State{}, fmt.Errorf("ledger %s: %w", b.db.Path(), err)
	}
	return s, nil
}

func generation(tx *bolt.Tx) uint64 {
	v := tx.Bucket(metaBucket).Get(generationKey)
	if len(v) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// Apply writes a batch in one transaction that is on the disk when it returns.
func (b *Bolt) Apply(_ context.Context, batch Batch) error {
	err := b.db.Update(func(tx *bolt.Tx) error {
		if have := generation(tx); batch.Generation != have+1 {
			return fmt.Errorf("generation %d does not follow %d: another writer was here", batch.Generation, have)
		}
		records, objects := tx.Bucket(recordBucket), tx.Bucket(objectBucket)
		for _, r := range batch.Put {
			if err := putJSON(records, addressKey(r.Address), r); err != nil {
				return err
			}
		}
		for _, a := range batch.Delete {
			if err := records.Delete(addressKey(a)); err != nil {
				return err
			}
		}
		for _, o := range batch.PutObjects {
			if err := putJSON(objects, []byte(o.Owner.String()), o); err != nil {
				return err
			}
		}
		for _, o := range batch.DelObjects {
			if err := objects.Delete([]byte(o.String())); err != nil {
				return err
			}
		}
		return tx.Bucket(metaBucket).Put(generationKey, binary.BigEndian.AppendUint64(nil, batch.Generation))
	})
	if err != nil {
		return fmt.Errorf("ledger %s: %w", b.db.Path(), err)
	}
	return nil
}

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
