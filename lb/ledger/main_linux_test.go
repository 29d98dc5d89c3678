package ledger

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// helperEnv makes the test binary a child of one of its own tests.
const helperEnv = "LEDGER_TEST_HELPER"

func TestMain(m *testing.M) {
	helpers := map[string]func(path string) error{"changes": makeChanges, "full": fullDisk, "limit": fileLimit, "readonly": readOnly}
	if f := helpers[os.Getenv(helperEnv)]; f != nil {
		if err := f(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}
