//! Where a cluster keeps its files: the data directory, the run-time directory and the folders of each node.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// Data directory unless `--data-dir` says otherwise.
pub(crate) const DEFAULT_DATA_DIR: &str = "/var/lib/weft";
const DEFAULT_RUN_DIR: &str = "/run/weft";

/// The two roots of a cluster on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    /// What must survive a reboot.
    pub(crate) data: PathBuf,
    /// What must not: locks, sockets, pins, namespaces.
    pub(crate) run: PathBuf,
}

impl Paths {
    /// Derives the run-time directory from the data directory, so that clusters on one machine never share one.
    pub(crate) fn new(data: &Path) -> Self {
        let data = std::path::absolute(data).unwrap_or_else(|_| data.to_path_buf());
        let run = if data == Path::new(DEFAULT_DATA_DIR) {
            PathBuf::from(DEFAULT_RUN_DIR)
        } else {
            // Short: socket paths below it must fit into 108 bytes.
            let mut hasher = DefaultHasher::new();
            data.hash(&mut hasher);
            PathBuf::from(format!("{DEFAULT_RUN_DIR}-{:08x}", hasher.finish() & 0xffff_ffff))
        };
        Self { data, run }
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.data.join("pki")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.data.join("store")
    }

    pub(crate) fn bin(&self) -> PathBuf {
        self.data.join("bin")
    }

    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.data.join("admin.kubeconfig")
    }

    pub(crate) fn cluster_file(&self) -> PathBuf {
        self.data.join("cluster.json")
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.data.join("weft.log")
    }

    /// Held by the process that runs the control plane (and, with one node, the node).
    pub(crate) fn server_lock(&self) -> PathBuf {
        self.run.join("weft.pid")
    }

    /// A node's cgroup, below the root of every hierarchy. Named as the run-time directory: two clusters on one machine may
    /// both have a node called after it, and the purge of one must not end the pods of the other.
    pub(crate) fn node_cgroup(&self, node: &str) -> PathBuf {
        Path::new(self.run.file_name().unwrap_or("weft".as_ref())).join(node)
    }

    pub(crate) fn node(&self, node: &str) -> NodePaths {
        NodePaths { data: self.data.join("nodes").join(node), run: self.run.join(node) }
    }
}

/// The folders of one node.
#[derive(Clone, Debug)]
pub(crate) struct NodePaths {
    pub(crate) data: PathBuf,
    pub(crate) run: PathBuf,
}

impl NodePaths {
    pub(crate) fn pki(&self) -> PathBuf {
        self.data.join("pki")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.data.join("logs").join("pods")
    }

    pub(crate) fn cni_conf(&self) -> PathBuf {
        self.run.join("cni")
    }

    /// Held by the process that runs this node's agent.
    pub(crate) fn lock(&self) -> PathBuf {
        self.run.join("agent.pid")
    }

    pub(crate) fn namespaces(&self) -> PathBuf {
        self.run.join("ns")
    }

    /// Where the node's agent answers questions about its dataplane.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.run.join("dataplane.sock")
    }

    pub(crate) fn bpffs(&self) -> PathBuf {
        self.run.join("bpf")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_on_one_machine_share_no_folder() {
        let standard = Paths::new(Path::new(DEFAULT_DATA_DIR));
        let other = Paths::new(Path::new("/srv/weft"));
        assert_eq!(standard.run, Path::new("/run/weft"));
        assert_ne!(standard.run, other.run);
        assert_eq!(other.run, Paths::new(Path::new("/srv/weft")).run);
        assert_eq!(standard.node_cgroup("a"), Path::new("weft/a"));
        assert_ne!(standard.node_cgroup("a"), other.node_cgroup("a"));
    }
}
