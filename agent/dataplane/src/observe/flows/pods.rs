//! Which pod a cgroup is, by its folder's number and name.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::node::cgroup2_mount;

/// Folders below the node's: class, pod, container, and what a container makes itself.
const MAX_DEPTH: usize = 4;
/// Numbers that are remembered; a node has some hundred.
const MAX_KNOWN: usize = 65_536;
/// How often an unknown number makes the tree be read again.
const RESCAN: Duration = Duration::from_millis(250);

/// The node's cgroups by number.
#[derive(Debug)]
pub(super) struct PodsByCgroup {
    /// The node's cgroup below the root of cgroup2.
    node: PathBuf,
    uids: HashMap<u64, String>,
    scanned: Option<Instant>,
}

impl PodsByCgroup {
    pub(super) fn new(node: PathBuf) -> Self {
        Self { node, uids: HashMap::new(), scanned: None }
    }

    /// The uid of the pod that a cgroup belongs to; `None` for the node's own processes.
    pub(super) fn uid(&mut self, cgroup: u64) -> Option<String> {
        let fresh = self.scanned.is_some_and(|at| at.elapsed() < RESCAN);
        if !self.uids.contains_key(&cgroup) && !fresh {
            self.scan();
        }
        self.uids.get(&cgroup).cloned()
    }

    /// A number is never used again, so what is known stays true; it is thrown away only to bound it.
    fn scan(&mut self) {
        self.scanned = Some(Instant::now());
        if self.uids.len() > MAX_KNOWN {
            self.uids.clear();
        }
        let Ok(root) = cgroup2_mount() else { return };
        walk(&root.join(&self.node), None, 0, &mut self.uids);
    }
}

/// Folders may vanish at any time: what can't be read has no processes any more.
fn walk(folder: &Path, pod: Option<&str>, depth: usize, uids: &mut HashMap<u64, String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let name = entry.file_name();
        let own = name.to_str().and_then(|name| name.strip_prefix("pod"));
        let pod = pod.or(own);
        if let (Some(pod), Ok(metadata)) = (pod, entry.metadata()) {
            uids.insert(metadata.ino(), pod.to_owned());
        }
        if depth < MAX_DEPTH {
            walk(&entry.path(), pod, depth + 1, uids);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_below_a_pod_is_the_pods() {
        let root = std::env::temp_dir().join(format!("weft-cgroups-{}", std::process::id()));
        let container = root.join("burstable").join("pod1-2-3").join("c0ffee");
        std::fs::create_dir_all(&container).unwrap();
        let mut uids = HashMap::new();
        walk(&root, None, 0, &mut uids);
        let number = |path: &Path| std::fs::metadata(path).unwrap().ino();
        assert_eq!(uids.get(&number(&container)).map(String::as_str), Some("1-2-3"));
        assert_eq!(uids.get(&number(&root.join("burstable"))), None);
        std::fs::remove_dir_all(root).unwrap();
    }
}
