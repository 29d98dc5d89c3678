package binaries

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// pipeDelay bounds the wait for output of a child that has ended but whose pipe somebody still holds.
const pipeDelay = 2 * time.Second

// Process is a started child. err is written before done is closed and read after.
type Process struct {
	pid  int
	proc *os.Process
	done chan struct{}
	err  error
}

// Start starts cmd as a child that dies when this process dies and that terminal signals do not reach.
func Start(cmd *exec.Cmd) (*Process, error) { return startProcess(cmd, false) }

// Pid is the child's process id.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends sig; a child that has already ended is no error.
func (p *Process) Signal(sig os.Signal) error { return p.signal(sig) }

// Stop ends the child with SIGTERM, after the grace with SIGKILL, and returns when it has ended.
func (p *Process) Stop(grace time.Duration) {
	_ = p.signal(syscall.SIGTERM)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.done:
		return
	case <-timer.C:
	}
	_ = p.signal(syscall.SIGKILL)
	<-p.done
}

// Ending says in words how the child ended; only after Done.
func (p *Process) Ending() string { return p.ending() }

// startProcess starts cmd as a child that dies when this process dies and that terminal signals do not reach.
//
// The parent-death signal is bound to the thread that forked, not to the process, so the goroutine that starts the child
// keeps its thread until the child has ended.
func startProcess(cmd *exec.Cmd, ambientCaps bool) (*Process, error) {
	cmd.SysProcAttr = sysProcAttr(ambientCaps)
	cmd.WaitDelay = pipeDelay
	p := &Process{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		err := cmd.Start()
		if err == nil {
			p.pid, p.proc = cmd.Process.Pid, cmd.Process
		}
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		<-p.done
		return nil, fmt.Errorf("start: %w", err)
	}
	return p, nil
}

// signal sends sig; a child that has already ended is no error.
func (p *Process) signal(sig os.Signal) error {
	if err := p.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// ending says in words how the child ended; only after done.
func (p *Process) ending() string {
	if p.err == nil {
		return "exit status 0"
	}
	return p.err.Error()
}
