//! A running cluster, and how a test gets into it.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::require;

use crate::probe::Place;
use crate::site::Site;

/// What every test against a cluster needs.
const NEEDS: &[&str] = &["root", "bpf", "kubectl", "weft"];
/// No test may take longer: a hang is a failure that names its test.
const LONGEST: Duration = Duration::from_secs(180);

/// A cluster with the probe's image on every node.
#[derive(Debug)]
pub struct Bed {
    /// The cluster.
    pub cluster: Cluster,
}

impl Bed {
    /// Starts it; `None` where it can't be had (a counted skip).
    ///
    /// # Errors
    /// If it doesn't start.
    pub fn start(test: &str, label: &str, flags: &[&str]) -> anyhow::Result<Option<Self>> {
        if !require(test, NEEDS) {
            return Ok(None);
        }
        let cluster = Cluster::start(label, flags)?;
        cluster.import(&image_archive("probe")?)?;
        Ok(Some(Self { cluster }))
    }

    /// Runs a test in a namespace of its own, which is deleted afterwards.
    ///
    /// # Errors
    /// Those of the test, and a test that takes longer than three minutes.
    pub fn run<T: Send>(
        &self,
        namespace: &str,
        test: impl AsyncFnOnce(Site) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            // Sockets belong to the namespace of the thread that makes them; a runtime of one thread has no other.
            let thread = scope.spawn(|| {
                let file = std::fs::File::open(self.cluster.netns.path())?;
                setns(file, CloneFlags::CLONE_NEWNET).context("enter the cluster's namespace")?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let site = Site::open(self, namespace).await?;
                    let limited = tokio::time::timeout(LONGEST, Box::pin(test(site.clone()))).await;
                    let closed = site.close().await;
                    let outcome = limited.context("the test took too long")??;
                    closed.map(|()| outcome)
                })
            });
            match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A place from which the node's own processes ask.
    ///
    /// # Errors
    /// If the node's agent doesn't run.
    pub fn node(&self, node: &str) -> anyhow::Result<Place> {
        Ok(Place::Netns(self.node_netns(node)?))
    }

    /// A place outside the nodes (with several nodes: the machine that joins them).
    #[must_use]
    pub fn outside(&self) -> Place {
        Place::Netns(self.cluster.netns.path())
    }

    /// The network namespace of a node: that of its agent.
    fn node_netns(&self, node: &str) -> anyhow::Result<PathBuf> {
        let data = self.cluster.data_dir().as_os_str().as_bytes();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            let command = std::fs::read(path.join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
            if [data, b"agent", node.as_bytes()].iter().all(|word| words.contains(word)) {
                return Ok(path.join("ns").join("net"));
            }
        }
        anyhow::bail!("no agent of {node} runs")
    }
}

/// The archive of an image.
///
/// # Errors
/// If `cargo xtask images` hasn't made it.
pub fn image_archive(name: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("WEFT_IMAGES")
        .map_or_else(|| weft_tests_harness::workspace().join("target").join("images"), PathBuf::from);
    let path = folder.join(format!("{name}.tar"));
    anyhow::ensure!(path.is_file(), "no {}; run `cargo xtask images`", path.display());
    Ok(path)
}
