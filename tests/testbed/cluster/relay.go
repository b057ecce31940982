package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// network is a network namespace; a socket belongs for ever to the one that its thread was in when it was made.
type network struct{ path string }

// ours is where this process and the control plane are.
var ours = network{"/proc/self/ns/net"}

// inside runs f on a thread that is in the namespace.
func (n network) inside(f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and with it its being elsewhere.
		runtime.LockOSThread()
		done <- func() error {
			file, err := os.Open(n.path)
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("%s: %w", n.path, err)
			}
			return f()
		}()
	}()
	return <-done
}

// relay carries each connection to an address in one network on to an address in another, so that neither needs a link
// to the other, nor a server more than its loopback address. It takes no more of them once it is closed.
func relay(from network, listen string, to network, dial string) (io.Closer, error) {
	var listener net.Listener
	if err := from.inside(func() (err error) {
		listener, err = net.Listen("tcp", listen)
		return err
	}); err != nil {
		return nil, err
	}
	go func() {
		for {
			here, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go carry(here, to, dial)
			}
		}
	}()
	return listener, nil
}

func carry(here net.Conn, to network, dial string) {
	defer here.Close()
	var there net.Conn
	if err := to.inside(func() (err error) {
		there, err = net.Dial("tcp", dial)
		return err
	}); err != nil {
		return
	}
	defer there.Close()
	both := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{here, there}, {there, here}} {
		go func() {
			_, _ = io.Copy(way[0], way[1])
			// The other way may go on: an answer comes after the end of a question.
			_ = way[0].(*net.TCPConn).CloseWrite()
			both <- struct{}{}
		}()
	}
	<-both
	<-both
}
