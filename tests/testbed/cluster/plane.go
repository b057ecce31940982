package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// patience limits the start, which takes 3.5 s on an idle machine with 2 cores and several times that on a busy one.
const patience = 90 * time.Second

type plane struct {
	ready   ready
	parts   []*part
	cleanup []func() // called after all parts have exited
}

// start starts etcd, kube-apiserver, kube-controller-manager if present, and then the node if requested. It tries three
// times, because another process may take a chosen port before it is used.
func start(bin, dir string, flags []string, node *node, end chan string) (*plane, error) {
	var err error
	for range 3 {
		var p *plane
		if p, err = try(bin, dir, flags, node, end); err == nil {
			return p, nil
		}
		p.stop()
	drain:
		for {
			select {
			case failed := <-end:
				if failed == "" {
					return nil, errors.New("stopped before the control plane was ready")
				}
			default:
				break drain
			}
		}
	}
	return nil, err
}

func try(bin, dir string, flags []string, node *node, end chan string) (*plane, error) {
	p := &plane{}
	ports, err := freePorts("etcd", "etcd-peer", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
	if err != nil {
		return p, err
	}
	keys, err := writeKeys(dir)
	if err != nil {
		return p, err
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	url := func(scheme, part string) string { return fmt.Sprintf("%s://127.0.0.1:%d", scheme, ports[part]) }
	p.ready = ready{
		Kubeconfig: at("kubeconfig"),
		Server:     url("https", "kube-apiserver"),
		AuditLog:   at("audit.log"),
		Dir:        dir,
		Ports:      ports,
		Pids:       map[string]int{},
	}
	if err := os.RemoveAll(at("etcd")); err != nil {
		return p, err
	}
	files := map[string]string{
		"audit-policy.yaml": auditPolicy,
		"tokens.csv":        keys.token + ",admin,admin,system:masters\n",
		"kubeconfig":        kubeconfig(p.ready.Server, keys),
	}
	for name, content := range files {
		if err := os.WriteFile(at(name), []byte(content), 0o600); err != nil {
			return p, err
		}
	}
	if kubectl := filepath.Join(bin, "kubectl"); exists(kubectl) {
		p.ready.Kubectl = kubectl
	}

	controllers := "garbage-collector-controller,namespace-controller,serviceaccount-controller," +
		"serviceaccount-token-controller,resourcequota-controller,root-ca-certificate-publisher-controller,clusterrole-aggregation-controller"
	if node != nil {
		controllers += ",node-lifecycle-controller,deployment-controller,replicaset-controller,disruption-controller"
		flags = append([]string{
			"--kubelet-client-certificate", at("kubelet-client.crt"), "--kubelet-client-key", at("kubelet-client.key"),
			"--kubelet-preferred-address-types", "Hostname",
		}, flags...)
	}
	part := func(name string, args ...string) error {
		return p.launch(name, dir, end, exec.Command(filepath.Join(bin, name), args...))
	}
	answers := func(url string) func() error {
		return func() error { _, err := p.get(url, keys); return err }
	}
	if err := part("etcd",
		"--data-dir", at("etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", url("http", "etcd"), "--advertise-client-urls", url("http", "etcd"),
		"--listen-peer-urls", url("http", "etcd-peer"), "--initial-advertise-peer-urls", url("http", "etcd-peer"),
		"--initial-cluster", "default="+url("http", "etcd-peer"),
	); err != nil {
		return p, err
	}
	if err := part("kube-apiserver", append([]string{
		"--etcd-servers", url("http", "etcd"),
		"--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(ports["kube-apiserver"]),
		// The API server refuses a loopback address here. Nothing connects to this one.
		"--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
		"--tls-cert-file", at("server.crt"), "--tls-private-key-file", at("server.key"),
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", at("service-account.key"),
		"--service-account-signing-key-file", at("service-account.key"),
		"--service-cluster-ip-range", "10.0.0.0/24", "--allow-privileged",
		"--authorization-mode", "RBAC", "--token-auth-file", at("tokens.csv"),
		"--audit-policy-file", at("audit-policy.yaml"), "--audit-log-path", at("audit.log"),
		// In MB. Tests read a single file; by default the log rotates at 100.
		"--audit-log-maxsize", "1000000",
	}, flags...)...); err != nil {
		return p, err
	}
	if err := p.await("kube-apiserver", dir, end, answers(url("https", "kube-apiserver")+"/readyz")); err != nil {
		return p, err
	}
	if exists(filepath.Join(bin, "kube-controller-manager")) {
		if err := part("kube-controller-manager",
			"--kubeconfig", at("kubeconfig"),
			"--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(ports["kube-controller-manager"]),
			"--controllers", controllers,
			"--service-account-private-key-file", at("service-account.key"), "--root-ca-file", at("ca.crt"),
			"--use-service-account-credentials", "--leader-elect=false",
		); err != nil {
			return p, err
		}
		if err := p.await("kube-controller-manager", dir, end, answers(url("https", "kube-controller-manager")+"/healthz")); err != nil {
			return p, err
		}
	}
	if node != nil {
		if err := node.start(p, bin, dir, keys, end); err != nil {
			return p, err
		}
	}
	return p, nil
}

func (p *plane) launch(name, dir string, end chan string, cmd *exec.Cmd) error {
	part, err := launch(name, dir, end, cmd)
	if err != nil {
		return err
	}
	p.parts = append(p.parts, part)
	p.ready.Pids[name] = part.cmd.Process.Pid
	return nil
}

// get returns the body of a part's answer with status 200.
func (p *plane) get(url string, keys *keys) ([]byte, error) {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(keys.ca)
	// The controller manager serves its own certificate. No credentials are sent to it.
	own := !strings.HasPrefix(url, p.ready.Server)
	if !own {
		request.Header.Set("Authorization", "Bearer "+keys.token)
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: pool, InsecureSkipVerify: own},
	}}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, errors.New(answer.Status)
	}
	return io.ReadAll(answer.Body)
}

// await polls until a part is ready. It returns at once if any part exits.
func (p *plane) await(name, dir string, end chan string, ready func() error) error {
	deadline := time.After(patience)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case failed := <-end:
			if failed == "" {
				end <- failed
				return errors.New("stopped before the control plane was ready")
			}
			return fmt.Errorf("%s did not start; end of its log:\n%s", failed, tail(filepath.Join(dir, failed+".log"), 20))
		case <-deadline:
			return fmt.Errorf("%s is not ready after %s (%w); end of its log:\n%s", name, patience, err, tail(filepath.Join(dir, name+".log"), 20))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stop kills the parts in reverse order of their start.
func (p *plane) stop() {
	if p == nil {
		return
	}
	for i := len(p.parts) - 1; i >= 0; i-- {
		_ = p.parts[i].cmd.Process.Kill()
		<-p.parts[i].done
	}
	for _, clean := range p.cleanup {
		clean()
	}
}

func freePorts(names ...string) (map[string]int, error) {
	ports := map[string]int{}
	for _, name := range names {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		// Keep all listeners open until the end, so that the ports differ.
		defer listener.Close()
		ports[name] = listener.Addr().(*net.TCPAddr).Port
	}
	return ports, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// auditPolicy records requests without bodies: tests count verbs, and Secrets must not be copied.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
- level: None
  nonResourceURLs: ["*"]
- level: Metadata
`
