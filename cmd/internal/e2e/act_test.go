package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// actEnv makes the test binary act as a caller or an application, so that a
// namespace needs no other program.
const actEnv = "ROOST_E2E_ACT"

// insideEnv says that the tests have been started again where they may make
// network namespaces.
const insideEnv = "ROOST_E2E_INSIDE"

func TestMain(m *testing.M) {
	if what := os.Getenv(actEnv); what != "" {
		os.Exit(act(strings.Fields(what)))
	}
	if code, done := unshared(); done {
		os.Exit(code)
	}
	code := m.Run()
	if roostDir != "" {
		_ = os.RemoveAll(roostDir)
	}
	os.Exit(code)
}

// unshared starts the tests again as root of their own namespaces, where this
// user is not root and the kernel lets it.
func unshared() (code int, done bool) {
	if os.Geteuid() == 0 || os.Getenv(insideEnv) != "" || exec.Command("unshare", "-Urnm", "true").Run() != nil {
		return 0, false
	}
	// ip netns keeps names in /run and resolvers in /etc/netns; what of /etc this
	// user may not read is not needed.
	script := `mount -t tmpfs none /run && mkdir -p /run/netns /run/etc && { cp -r /etc/. /run/etc/ 2>/dev/null || true; } && mount --bind /run/etc /etc && mkdir -p /etc/netns && ip link set lo up && exec "$0" "$@"`
	cmd := exec.Command("unshare", append([]string{"-Urnm", "sh", "-c", script, os.Args[0]}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	_ = cmd.Run()
	return cmd.ProcessState.ExitCode(), true
}

func act(words []string) int {
	switch {
	case words[0] == "call" && len(words) == 3:
		fmt.Println(callFrom(words[1], words[2]))
		return 0
	case words[0] == "serve" && len(words) == 4:
		return serve(words[1], words[2], words[3])
	}
	return 64
}

func callFrom(kind, target string) string {
	const wait = time.Second
	if kind == "tcp" {
		conn, err := net.DialTimeout("tcp", target, wait)
		if err != nil {
			return "refused"
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
			return err.Error()
		}
		data, _ := io.ReadAll(io.LimitReader(conn, 1<<10))
		return "got " + string(data)
	}
	client := http.Client{Timeout: 3 * wait, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := client.Get(target)
	if err != nil {
		return "failed " + err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	data, _ := io.ReadAll(res.Body)
	return strings.TrimSpace(fmt.Sprintf("%d %s %s", res.StatusCode, res.Header.Get("x-roost-reason"), data))
}

// serve answers every request, or greets every TCP connection, with the name.
func serve(kind, name, address string) int {
	l, err := net.Listen("tcp", address)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("listening", l.Addr())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		os.Exit(0)
	}()
	if kind == "http" {
		s := http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })}
		fmt.Println(s.Serve(l))
		return 1
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return 1
		}
		go func() {
			_, _ = io.WriteString(conn, name)
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}()
	}
}
