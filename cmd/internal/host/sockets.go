package host

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"
)

const stateListen = "0A"

// WildcardPorts lists the TCP ports at which some process of this network
// namespace listens on every address. Where that cannot be read it is empty.
func WildcardPorts() []uint16 {
	var out []uint16
	for _, path := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			if port, ok := wildcard(lines.Text()); ok {
				out = append(out, port)
			}
		}
		_ = f.Close()
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// wildcard reads a line of /proc/net/tcp: "sl local_address rem_address st ...".
func wildcard(line string) (uint16, bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 || fields[3] != stateListen {
		return 0, false
	}
	address, port, ok := strings.Cut(fields[1], ":")
	if !ok || strings.Trim(address, "0") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(port, 16, 16)
	return uint16(n), err == nil
}
