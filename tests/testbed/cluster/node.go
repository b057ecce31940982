package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A node runs kubelet, containerd and pods in its own mount, PID and network namespaces. containerd is the first process
// of the PID namespace. When it ends, the kernel also ends shims and pods, and their mounts go with the last of them
// (pid_namespaces(7)), however this process ends. The network namespace has no link to the machine's networks. Relays are
// its only connection, so that servers on the machine need only a loopback address.

const (
	// nodeAddress is the node's address in its own network. Pods reach the relays of the machine there. It is the first
	// address of the service range, where pods expect the API server, so that no kube-proxy is needed.
	nodeAddress = "10.0.0.1"
	// nodeName is the host at which the API server reaches the kubelet for `kubectl logs` and `exec`, through a relay.
	nodeName = "localhost"
)

// enter sets up the file systems and the network of the namespaces. containerd, runc, CNI plugins and kubelet keep state
// in some of these folders, whatever their configuration.
const enter = `mount --make-rprivate /
mount --make-rshared /
mount -t proc proc /proc
for folder in /run /var/log /var/lib/kubelet /var/lib/cni; do
	mkdir -p $folder
	mount -t tmpfs tmpfs $folder
done
ip link set lo up
ip address add ` + nodeAddress + `/32 dev lo
`

// cniFolders are the plugin folders of distributions and of upstream releases.
var cniFolders = []string{"/usr/lib/cni", "/opt/cni/bin"}

// isolated runs a shell script in new namespaces, as the first process of the PID namespace.
func isolated(script string, args ...string) *exec.Cmd {
	cmd := exec.Command("/bin/sh", append([]string{"-ec", script}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET}
	return cmd
}

// lacks returns what this machine lacks to run a node. It is empty if nothing is missing.
func lacks() []string {
	if os.Geteuid() != 0 {
		return []string{"root"}
	}
	var missing []string
	for _, command := range []string{"containerd", "ctr", "runc", "ip", "nsenter"} {
		if _, err := exec.LookPath(command); err != nil {
			missing = append(missing, command)
		}
	}
	if _, err := findBusybox(); err != nil {
		missing = append(missing, "a static busybox")
	}
	if cniFolder() == "" {
		missing = append(missing, "the CNI plugins bridge and host-local in "+strings.Join(cniFolders, " or "))
	}
	if len(missing) > 0 {
		return missing
	}
	if said, err := isolated(enter + "ip link add testbed type bridge").CombinedOutput(); err != nil {
		missing = append(missing, fmt.Sprintf("permission to create namespaces (%v: %s)", err, strings.TrimSpace(string(said))))
	}
	probe := cgroups(fmt.Sprintf("zitadel-tokens-testbed-probe-%d", os.Getpid()))
	if err := probe.make(); err != nil {
		missing = append(missing, fmt.Sprintf("writable control groups (%v)", err))
	}
	probe.remove()
	return missing
}

func cniFolder() string {
	for _, folder := range cniFolders {
		if exists(filepath.Join(folder, "bridge")) && exists(filepath.Join(folder, "host-local")) {
			return folder
		}
	}
	return ""
}

// node is the configuration of a node.
type node struct {
	images []string // NAME=FILE, archives
	reach  []string // ports on this machine's loopback address that pods reach at nodeAddress
}

func (n *node) start(p *plane, bin, dir string, keys *keys, end chan string) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	busybox, err := findBusybox()
	if err != nil {
		return fmt.Errorf("busybox: %w", err)
	}
	if err := writeBusyboxImage(at("busybox.tar"), busybox); err != nil {
		return err
	}
	if err := os.MkdirAll(at("cni"), 0o700); err != nil {
		return err
	}
	group := cgroups(filepath.Base(dir))
	if err := group.make(); err != nil {
		return err
	}
	p.cleanup = append(p.cleanup, group.remove)
	ports := p.ready.Ports
	for name, content := range map[string]string{
		"containerd.toml":    containerdConfig(dir),
		"cni/10-bridge.json": cniConfig(dir),
		"kubelet.yaml":       kubeletConfig(dir, string(group), ports["kubelet"]),
		"kubelet.kubeconfig": kubeconfig("https://"+nodeAddress, keys),
	} {
		if err := os.WriteFile(at(name), []byte(content), 0o600); err != nil {
			return err
		}
	}

	// The timeout is for a containerd that does not answer. A call normally takes less than a second.
	ctr := func(args ...string) *exec.Cmd {
		options := []string{"--address", at("containerd.sock"), "--namespace", "k8s.io", "--timeout", "30s"}
		return exec.Command("ctr", append(options, args...)...)
	}
	containerd := isolated(enter+`exec containerd --config "$0"`, at("containerd.toml"))
	if err := p.launch("containerd", dir, end, containerd); err != nil {
		return err
	}
	if err := p.await("containerd", dir, end, func() error {
		return ctr("version").Run()
	}); err != nil {
		return err
	}
	first := containerd.Process.Pid
	inside := network{fmt.Sprintf("/proc/%d/ns/net", first)}
	kubelet := fmt.Sprint(ports["kubelet"])
	if err := p.relay(ours, "127.0.0.1:"+kubelet, inside, nodeAddress+":"+kubelet); err != nil {
		return err
	}
	if err := p.relay(inside, nodeAddress+":443", ours, fmt.Sprintf("127.0.0.1:%d", ports["kube-apiserver"])); err != nil {
		return err
	}
	for _, port := range n.reach {
		if err := p.relay(inside, nodeAddress+":"+port, ours, "127.0.0.1:"+port); err != nil {
			return err
		}
	}
	for _, image := range append([]string{busyboxImage + "=" + at("busybox.tar")}, n.images...) {
		name, archive, _ := strings.Cut(image, "=")
		load := ctr("images", "import", "--snapshotter", "native", "--index-name", name, archive)
		if said, err := load.CombinedOutput(); err != nil {
			return fmt.Errorf("image %s: %w: %s", image, err, said)
		}
	}
	if err := p.launch("kubelet", dir, end, exec.Command("nsenter",
		"--target", fmt.Sprint(first), "--mount", "--pid", "--net", "--", filepath.Join(bin, "kubelet"),
		"--config", at("kubelet.yaml"), "--kubeconfig", at("kubelet.kubeconfig"), "--root-dir", at("kubelet"),
		"--cert-dir", at("kubelet-pki"), "--hostname-override", nodeName, "--node-ip", nodeAddress,
	)); err != nil {
		return err
	}
	if err := p.launch("kube-scheduler", dir, end, exec.Command(filepath.Join(bin, "kube-scheduler"),
		"--kubeconfig", at("kubeconfig"), "--leader-elect=false",
		"--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(ports["kube-scheduler"]),
	)); err != nil {
		return err
	}
	p.ready.Node = nodeAddress
	return p.await("kubelet", dir, end, func() error {
		body, err := p.get(p.ready.Server+"/api/v1/nodes/"+nodeName, keys)
		if err != nil {
			return err
		}
		var node struct {
			Spec   struct{ Taints []any }
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := json.Unmarshal(body, &node); err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type == "Ready" && condition.Status == "True" && len(node.Spec.Taints) == 0 {
				return nil
			}
		}
		return errors.New("the node is not Ready")
	})
}

func (p *plane) relay(from network, listen string, to network, dial string) error {
	relay, err := relay(from, listen, to, dial)
	if err == nil {
		p.cleanup = append(p.cleanup, func() { relay.Close() })
	}
	return err
}

// containerdConfig returns the configuration of containerd. Snapshots are copies ("native"), because overlayfs does not
// work on top of itself and this machine may be a container. Without restrict_oom_score_adj, no sandbox starts if
// CAP_SYS_RESOURCE is missing (docs/adr/0018-testbed-of-real-parts.md).
func containerdConfig(dir string) string {
	return fmt.Sprintf(`version = 2
root = "%[1]s/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"] # it would create /opt/containerd
[grpc]
  address = "%[1]s/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "%[2]s"
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "%[3]s"
  conf_dir = "%[1]s/cni"
`, dir, busyboxImage, cniFolder())
}

func cniConfig(dir string) string {
	return fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "testbed", "type": "bridge", "bridge": "cni0", "isGateway": true,
 "ipam": {"type": "host-local", "dataDir": "%s/addresses", "ranges": [[{"subnet": "10.1.0.0/16"}]],
  "routes": [{"dst": "0.0.0.0/0"}]}}
`, dir)
}

// kubeletConfig returns the configuration of the kubelet. A changed Secret reaches a pod's volume at the pod's next sync.
// The default syncFrequency is one minute.
func kubeletConfig(dir, group string, port int) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %[4]s
port: %[3]d
healthzPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: "%[1]s/ca.crt"}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /%[2]s
failCgroupV1: false
enforceNodeAllocatable: []
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
containerRuntimeEndpoint: unix://%[1]s/containerd.sock
podLogsDir: /var/log/pods
resolvConf: ""
configMapAndSecretChangeDetectionStrategy: Watch
syncFrequency: %[5]s
evictionHard: {imagefs.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
`, dir, group, port, nodeAddress, 2*time.Second)
}
