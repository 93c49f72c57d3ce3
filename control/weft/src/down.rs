//! `weft down`: ends what `weft up` started, and with `--purge` removes it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;

use crate::cluster::Cluster;
use crate::lock::{self, Process};
use crate::paths::Paths;
use crate::{network, nodes};

/// How long a process may take to stop before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs the command. What is gone already is no error.
pub(crate) fn down(paths: &Paths, purge: bool) -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "weft needs root to stop a cluster");
    let cluster = Cluster::read(&paths.cluster_file())?;
    end(&paths.server_lock())?;
    let mut failed = Vec::new();
    if let Some(cluster) = &cluster {
        for (index, node) in cluster.nodes.iter().enumerate() {
            end(&paths.node(node).lock())?;
            if let Err(error) = remove_node(paths, cluster, index, purge) {
                failed.push(format!("{error:#}"));
            }
        }
        if purge {
            failed.extend(network::remove_underlay(cluster));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    if purge {
        for folder in [&paths.run, &paths.data] {
            remove_folder(folder)?;
        }
    }
    Ok(())
}

/// A process of its own does it, within the node's namespaces.
fn remove_node(paths: &Paths, cluster: &Cluster, index: usize, purge: bool) -> anyhow::Result<()> {
    let name = &cluster.nodes[index];
    let addresses = if cluster.nodes.len() == 1 {
        network::machine_addresses(cluster)?.addresses
    } else {
        cluster.underlay_addresses(index)
    };
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--data-dir").arg(&paths.data).args(["--log", "warn", "agent", "--node", name]);
    command.arg("--node-ip").arg(addresses.to_string()).arg(if purge { "--purge" } else { "--stop" });
    let namespaces = paths.node(name).namespaces();
    if nodes::exist(&namespaces) {
        command.arg("--enter").arg(&namespaces);
    }
    let output = command.output().context("cannot run the node's removal")?;
    ensure!(
        output.status.success(),
        "node {name}: {}",
        String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("error: ")
    );
    if purge { nodes::remove(paths, name) } else { Ok(()) }
}

/// SIGTERM to the holder of a role; SIGKILL if it takes too long.
fn end(lock_file: &Path) -> anyhow::Result<()> {
    let Some(pid) = lock::holder(lock_file) else { return Ok(()) };
    let Ok(process) = Process::open(pid) else { return Ok(()) };
    process.signal(Signal::SIGTERM).with_context(|| format!("cannot stop process {pid}"))?;
    if !process.wait(PATIENCE)? {
        process.signal(Signal::SIGKILL)?;
        process.wait(PATIENCE)?;
    }
    Ok(())
}

fn remove_folder(folder: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
