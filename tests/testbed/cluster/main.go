// Command cluster starts a real Kubernetes control plane on loopback and stops it when its stdin closes.
//
// It prints one JSON line when the API server is ready. It imports no Kubernetes packages, so that a change here does
// not relink the control plane (docs/adr/0018-testbed-of-real-parts.md).
//
//	cluster up --bin DIR [--node [--image NAME=FILE]... [--reach PORT]...] [FLAG...]
//	cluster lacks
//
// DIR holds etcd, kube-apiserver and, for garbage collection, kube-controller-manager. Further flags go to
// kube-apiserver. With --node, it also starts a node. --image loads an image from an OCI archive into the node, and
// --reach lets pods reach a port of 127.0.0.1 at the node's address. `lacks` prints what this machine lacks to run a
// node, or nothing if it can run one.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

func main() {
	// The kernel sends Pdeathsig when the *thread* that started a child ends, so stay on the main thread.
	runtime.LockOSThread()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

// ready is the JSON line on stdout.
type ready struct {
	Kubeconfig string         `json:"kubeconfig"`
	Kubectl    string         `json:"kubectl,omitempty"`
	Server     string         `json:"server"`
	AuditLog   string         `json:"auditLog"`
	Dir        string         `json:"dir"`
	Node       string         `json:"node,omitempty"` // its address, as pods see it
	Ports      map[string]int `json:"ports"`
	Pids       map[string]int `json:"pids"`
}

func run(args []string) error {
	if len(args) == 1 && args[0] == "lacks" {
		fmt.Print(strings.Join(lacks(), ", "))
		return nil
	}
	if len(args) == 0 || args[0] != "up" {
		return errors.New("usage: cluster up --bin DIR [--node] [FLAG...] | cluster lacks")
	}
	flags := flag.NewFlagSet("up", flag.ContinueOnError)
	bin := flags.String("bin", "", "folder with etcd, kube-apiserver and kube-controller-manager")
	withNode := flags.Bool("node", false, "also start a node")
	var wanted node
	flags.Func("image", "image to load into the node from an OCI archive, NAME=FILE", func(image string) error {
		wanted.images = append(wanted.images, image)
		return nil
	})
	flags.Func("reach", "port of 127.0.0.1 that pods can reach", func(port string) error {
		wanted.reach = append(wanted.reach, port)
		return nil
	})
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	node := &wanted
	if !*withNode {
		node = nil
	} else if missing := lacks(); len(missing) > 0 {
		return errors.New("cannot run a node: this machine lacks " + strings.Join(missing, ", "))
	}
	dir, err := os.MkdirTemp("", "zitadel-tokens-testbed-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	end := make(chan string, 16) // more than the number of senders, so that no sender blocks
	go func() {
		// The pipe closes when the parent ends, even after kill -9.
		_, _ = io.Copy(io.Discard, os.Stdin)
		end <- ""
	}()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-signals; end <- "" }()

	plane, err := start(*bin, dir, flags.Args(), node, end)
	if plane != nil {
		defer plane.stop()
	}
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(plane.ready); err != nil {
		return err
	}
	if failed := <-end; failed != "" {
		return fmt.Errorf("%s exited; end of its log:\n%s", failed, tail(filepath.Join(dir, failed+".log"), 20))
	}
	return nil
}

// part is one process of the control plane.
type part struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
}

// launch starts a part and sends its name to end when it exits.
func launch(name, dir string, end chan<- string, cmd *exec.Cmd) (*part, error) {
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, dir
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &part{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.done)
		end <- name
	}()
	return p, nil
}

// tail returns the last lines of a file.
func tail(path string, lines int) string {
	file, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	var last []string
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		if last = append(last, scanner.Text()); len(last) > lines {
			last = last[1:]
		}
	}
	out := ""
	for _, line := range last {
		out += line + "\n"
	}
	return out
}
