//! Settings of a kubelet, checked whole before anything is made.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use tokio::sync::watch;

use crate::{Error, PodGate};

/// Settings of one node's kubelet. [`Config::new`] fills in the defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the Node object.
    pub node_name: String,
    /// The node's address of the cluster's primary family, reported as InternalIP.
    pub node_ip: IpAddr,
    /// Its address of the other family, in a cluster of both.
    pub secondary_node_ip: Option<IpAddr>,
    /// The cluster's data folder; this node's is `nodes/<node>` in it.
    pub data_dir: PathBuf,
    /// Run-time state of all nodes; this node's is `<node>` in it.
    pub run_dir: PathBuf,
    /// Logs of the containers: `<ns>_<pod>_<uid>/<container>/<attempt>.log`.
    pub pod_log_dir: PathBuf,
    /// Address of the cluster's DNS.
    pub cluster_dns: IpAddr,
    /// Domain of the cluster.
    pub cluster_domain: String,
    /// The resolv.conf of the node, for `dnsPolicy: Default` and names outside the cluster.
    pub host_resolv_conf: PathBuf,
    /// What the HTTPS server identifies itself and its clients with.
    pub tls: ServerTls,
    /// Where the HTTPS server listens.
    pub listen: SocketAddr,
    /// Labels of the Node besides the well-known ones. A node may not give itself a role (`node-role.kubernetes.io/…`): the API
    /// server refuses that, an administrator sets it.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the Node; without a value, one is removed that an earlier kubelet may have left.
    pub annotations: BTreeMap<String, Option<String>>,
    /// Replaces what the machine says about itself.
    pub capacity: CapacityOverrides,
    /// True once the node's network (data plane) carries pods.
    pub network_ready: watch::Receiver<bool>,
    /// What a pod waits for before its first container; nothing if `None`.
    pub pod_gate: Option<PodGate>,
}

/// TLS material of the kubelet's server, PEM.
#[derive(Clone)]
pub struct ServerTls {
    /// Certificate chain.
    pub cert_pem: String,
    /// Private key.
    pub key_pem: String,
    /// CA that signs the clients' certificates.
    pub client_ca_pem: String,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

/// Capacity to report instead of the machine's own (several nodes may share a machine).
#[derive(Clone, Debug, Default)]
pub struct CapacityOverrides {
    /// CPU in thousandths.
    pub cpu_milli: Option<u64>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Disk in bytes.
    pub ephemeral_storage_bytes: Option<u64>,
    /// Number of pods; 110 by default.
    pub pods: Option<u32>,
}

/// Port of the kubelet's server.
pub(crate) const PORT: u16 = 10250;

impl Config {
    /// Settings with every default filled in.
    #[must_use]
    pub fn new(
        node_name: &str,
        node_ip: IpAddr,
        data_dir: &Path,
        tls: ServerTls,
        network_ready: watch::Receiver<bool>,
    ) -> Self {
        Self {
            node_name: node_name.to_owned(),
            node_ip,
            secondary_node_ip: None,
            data_dir: data_dir.to_owned(),
            run_dir: PathBuf::from("/run/weft"),
            pod_log_dir: data_dir.join("nodes").join(node_name).join("logs/pods"),
            cluster_dns: IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)),
            cluster_domain: "cluster.local".to_owned(),
            host_resolv_conf: PathBuf::from("/etc/resolv.conf"),
            tls,
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            capacity: CapacityOverrides::default(),
            network_ready,
            pod_gate: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let mut wrong = Vec::new();
        let name_ok = !self.node_name.is_empty()
            && self.node_name.len() <= 253
            && self
                .node_name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
            && !self.node_name.starts_with(['.', '-']);
        if !name_ok {
            wrong.push(format!("node name {:?} is no DNS subdomain", self.node_name));
        }
        for (what, dir) in [
            ("data folder", &self.data_dir),
            ("run folder", &self.run_dir),
            ("log folder", &self.pod_log_dir),
        ] {
            if !dir.is_absolute() {
                wrong.push(format!("{what} {dir:?} is not absolute"));
            }
        }
        if let Some(other) = self.secondary_node_ip.filter(|ip| ip.is_ipv6() == self.node_ip.is_ipv6()) {
            wrong.push(format!("node addresses {} and {other} are of one family", self.node_ip));
        }
        if self.cluster_domain.is_empty() {
            wrong.push("cluster domain is empty".to_owned());
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::Config(wrong.join("; "))) }
    }

    /// The node's addresses, the primary family's first.
    pub(crate) fn node_ips(&self) -> Vec<IpAddr> {
        std::iter::once(self.node_ip).chain(self.secondary_node_ip).collect()
    }

    /// The pods' folders, by uid.
    pub(crate) fn pods_dir(&self) -> PathBuf {
        pods_dir(&self.data_dir, &self.node_name)
    }

    /// What lies in memory of the pods' volumes, by uid.
    pub(crate) fn memory_dir(&self) -> PathBuf {
        memory_dir(&self.run_dir, &self.node_name)
    }
}

/// The folder of the pods' folders of a node.
pub(crate) fn pods_dir(data_dir: &Path, node: &str) -> PathBuf {
    data_dir.join("nodes").join(node).join("pods")
}

/// The folder of a node's volumes that lie in memory.
pub(crate) fn memory_dir(run_dir: &Path, node: &str) -> PathBuf {
    run_dir.join(node).join("volumes")
}
