//! How each of upstream's programs is started: its arguments and its configuration file. What isn't named has its default; what is named
//! is what kubeadm names, or what a machine asks for that other clusters run on too.

use std::fs;

use serde_json::json;

use super::place::ADDRESS;
use super::{SANDBOX, Upstream};
use crate::cni::REFERENCE;

/// containerd's socket.
pub(super) const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// The mode of kube-proxy, as where it is measured alone: `nftables` (the default here) or `iptables`.
const PROXY_MODE: &str = "WEFT_BENCH_KUBE_PROXY_MODE";
const PODS: &str = "10.42.0.0/24";
const SERVICES: &str = "10.43.0.0/16";

/// Flags with their values.
fn flags<const N: usize>(flags: [(&str, &str); N]) -> Vec<String> {
    flags.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

/// As Debian has it, so with its log of commits synced to the disk.
pub(super) fn etcd(_: &Upstream) -> anyhow::Result<Vec<String>> {
    Ok(flags([
        ("name", "upstream"),
        ("data-dir", "/var/lib/etcd"),
        ("listen-client-urls", "http://127.0.0.1:2379"),
        ("advertise-client-urls", "http://127.0.0.1:2379"),
        ("listen-peer-urls", "http://127.0.0.1:2380"),
        ("initial-advertise-peer-urls", "http://127.0.0.1:2380"),
        ("initial-cluster", "upstream=http://127.0.0.1:2380"),
    ]))
}

pub(super) fn apiserver(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let file = |name| of.credentials.file(name);
    Ok(flags([
        ("advertise-address", ADDRESS),
        ("secure-port", "6443"),
        ("etcd-servers", "http://127.0.0.1:2379"),
        ("service-cluster-ip-range", SERVICES),
        ("allow-privileged", "true"),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction"),
        ("token-auth-file", &file("tokens.csv")),
        ("client-ca-file", &file("ca.crt")),
        ("tls-cert-file", &file("server.crt")),
        ("tls-private-key-file", &file("server.key")),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        ("service-account-key-file", &file("accounts.pub")),
        ("service-account-signing-key-file", &file("accounts.key")),
    ]))
}

pub(super) fn controller_manager(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let own = of.credentials.kubeconfig("kube-controller-manager");
    Ok(flags([
        ("kubeconfig", &own),
        ("authentication-kubeconfig", &own),
        ("authorization-kubeconfig", &own),
        ("use-service-account-credentials", "true"),
        ("service-account-private-key-file", &of.credentials.file("accounts.key")),
        ("root-ca-file", &of.credentials.file("ca.crt")),
        ("leader-elect", "true"),
    ]))
}

pub(super) fn scheduler(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let own = of.credentials.kubeconfig("kube-scheduler");
    Ok(flags([
        ("kubeconfig", &own),
        ("authentication-kubeconfig", &own),
        ("authorization-kubeconfig", &own),
        ("leader-elect", "true"),
    ]))
}

/// With a network of bridge and host-local, the features of which are those that C1 compares.
pub(super) fn containerd(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let networks = of.data.path().join("cni");
    fs::create_dir_all(&networks)?;
    let network = json!({
        "cniVersion": "1.0.0", "name": "upstream", "plugins": [
            {"type": "bridge", "bridge": "cni0", "mtu": 1450, "isDefaultGateway": true, "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]]}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::write(networks.join("10-upstream.conflist"), network.to_string())?;
    let config = format!(
        "version = 2
root = \"/var/lib/containerd\"
state = \"/run/containerd\"
[grpc]
address = \"{CONTAINERD}\"
[plugins.\"io.containerd.internal.v1.opt\"]
path = \"/var/lib/containerd/opt\"
[plugins.\"io.containerd.grpc.v1.cri\"]
sandbox_image = \"{SANDBOX}\"
# Not every machine lets a process be spared more than its parent.
restrict_oom_score_adj = true
[plugins.\"io.containerd.grpc.v1.cri\".cni]
bin_dir = \"{REFERENCE}\"
conf_dir = \"{}\"
[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]
runtime_type = \"io.containerd.runc.v2\"
[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]
BinaryName = \"{}\"
SystemdCgroup = false
",
        networks.display(),
        of.program("runc").display(),
    );
    let path = of.data.path().join("containerd.toml");
    fs::write(&path, config)?;
    Ok(flags([("config", &path.to_string_lossy())]))
}

pub(super) fn kubelet(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let resolv = of.data.path().join("resolv.conf");
    fs::write(&resolv, "")?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": of.credentials.file("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "clusterDNS": ["10.43.0.10"], "clusterDomain": "cluster.local", "resolvConf": resolv,
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
        "cgroupDriver": "cgroupfs", "cgroupRoot": of.cgroups.path(),
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        "failCgroupV1": false, "failSwapOn": false,
        // How full the disk is says nothing here: pods are not to be evicted for it, nor images to be removed.
        "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
    });
    let path = of.data.path().join("kubelet.json");
    fs::write(&path, config.to_string())?;
    Ok(flags([
        ("config", &path.to_string_lossy()),
        ("kubeconfig", &of.credentials.kubeconfig("kubelet")),
        ("hostname-override", &of.credentials.node),
        ("node-ip", ADDRESS),
    ]))
}

pub(super) fn proxy(of: &Upstream) -> anyhow::Result<Vec<String>> {
    let mode = std::env::var(PROXY_MODE).unwrap_or_else(|_| "nftables".to_owned());
    Ok(flags([
        ("kubeconfig", &of.credentials.kubeconfig("kube-proxy")),
        ("hostname-override", &of.credentials.node),
        ("proxy-mode", &mode),
        ("cluster-cidr", PODS),
        // Parameters of the whole machine, which it leaves alone then.
        ("conntrack-max-per-core", "0"),
        ("conntrack-tcp-timeout-established", "0s"),
        ("conntrack-tcp-timeout-close-wait", "0s"),
    ]))
}
