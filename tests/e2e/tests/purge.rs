//! `weft down --purge` leaves nothing: the machine is as before `weft up`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::{NEEDS, image_archive, nginx, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{require, wait_until};

/// What a cluster leaves traces in. Other clusters may run on the machine, so each part is narrowed to this one: by its
/// directories, by its network namespace, by the ids that eBPF objects had when it ran.
#[derive(Debug, Default, PartialEq, Eq)]
struct Host {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    links: BTreeSet<String>,
    addresses: BTreeSet<String>,
    rules: String,
    cgroups: BTreeSet<String>,
    folders: BTreeSet<String>,
}

#[test]
fn one_node_leaves_nothing() -> anyhow::Result<()> {
    leaves_nothing("purge::one_node", "purge", &[])
}

#[test]
fn three_nodes_leave_nothing() -> anyhow::Result<()> {
    leaves_nothing("purge::three_nodes", "purge3", &["--nodes", "3"])
}

fn leaves_nothing(test: &str, label: &str, flags: &[&str]) -> anyhow::Result<()> {
    if !require(test, NEEDS) || !require(test, &["bpftool", "nft"]) {
        return Ok(());
    }
    // The namespace and the data directory are made by the harness, so the state before is that of a cluster just purged.
    let mut cluster = Cluster::start(label, flags)?;
    let run = run_dir(&cluster)?;
    cluster.purge()?;
    let clean = look(&cluster, &run)?;
    ensure!(
        clean.processes.is_empty() && clean.mounts.is_empty() && clean.cgroups.is_empty(),
        "left: {clean:#?}"
    );
    ensure!(clean.folders.is_empty(), "folders left: {clean:#?}");
    ensure!(clean.links == BTreeSet::from(["lo".to_owned()]), "devices left: {clean:#?}");
    ensure!(clean.rules.is_empty(), "rules left: {clean:#?}");

    std::fs::create_dir_all(cluster.data_dir())?;
    let elsewhere = loaded_programs()?;
    cluster.up()?;
    for image in ["busybox", "nginx"] {
        cluster.import(&image_archive(image)?)?;
    }
    cluster.apply(&nginx("web", 2))?;
    cluster.apply(&sleeper("client", None))?;
    cluster.kubectl(&["expose", "deployment/web", "--port=80", "--type=NodePort"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    cluster.kubectl(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    let busy = look(&cluster, &run)?;
    // Else the looking itself would be blind.
    ensure!(
        !busy.processes.is_empty()
            && !busy.mounts.is_empty()
            && !busy.cgroups.is_empty()
            && busy.links.len() > 1,
        "a running cluster shows: {busy:#?}"
    );
    let own = pinned_programs(&run)?;
    ensure!(!own.is_empty(), "a running cluster has no pinned programs");
    cluster.purge()?;
    assert_eq!(look(&cluster, &run)?, clean);
    wait_until("the kernel has freed the programs", Duration::from_secs(10), || {
        let left: Vec<u64> =
            loaded_programs()?.difference(&elsewhere).copied().filter(|id| own.contains(id)).collect();
        ensure!(left.is_empty(), "programs {left:?} are loaded still");
        Ok(Some(()))
    })
}

/// The run-time directory: the one that holds a bpffs or lock made by this cluster.
fn run_dir(cluster: &Cluster) -> anyhow::Result<String> {
    let pid = cluster_pid(cluster)?;
    for entry in std::fs::read_dir("/run")? {
        let path = entry?.path();
        let holder = std::fs::read_to_string(path.join("weft.pid")).unwrap_or_default();
        if holder.trim() == pid {
            return Ok(path.to_string_lossy().into_owned());
        }
    }
    anyhow::bail!("no run-time directory has the lock of process {pid}")
}

fn cluster_pid(cluster: &Cluster) -> anyhow::Result<String> {
    let data = cluster.data_dir().to_string_lossy().into_owned();
    let found = processes(&[&data])?.into_iter().find(|line| line.ends_with(" up") || line.contains(" up "));
    let line = found.context("weft up doesn't run")?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

fn look(cluster: &Cluster, run: &str) -> anyhow::Result<Host> {
    let data = cluster.data_dir().to_string_lossy().into_owned();
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let name = Path::new(run).file_name().context("a run-time directory has a name")?;
    let below = |line: &&str| line.contains(&format!("{run}/")) || line.contains(&data);
    let links = output(cluster.netns.command("ip")?.args(["-o", "-j", "link"]))?;
    let addresses = output(cluster.netns.command("ip")?.args(["-o", "-j", "address"]))?;
    Ok(Host {
        processes: processes(&[&data, &format!("{run}/")])?,
        mounts: mounts.lines().filter(below).map(str::to_owned).collect(),
        links: names(&links, "ifname")?,
        addresses: names(&addresses, "ifname")?,
        rules: output(cluster.netns.command("nft")?.args(["list", "ruleset"]))?,
        cgroups: cgroups(name.as_ref())?,
        folders: [run, &data]
            .iter()
            .filter(|path| Path::new(path).exists())
            .map(|path| (*path).to_owned())
            .collect(),
    })
}

/// Processes whose command line names one of the folders, but for this test's own.
fn processes(folders: &[&str]) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(path.join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
        if pid != std::process::id() && folders.iter().any(|folder| line.contains(folder)) {
            found.insert(format!("{pid} {line}"));
        }
    }
    Ok(found)
}

/// The cluster's groups in every hierarchy.
fn cgroups(name: &Path) -> anyhow::Result<BTreeSet<String>> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = BTreeSet::new();
    let mut roots = vec![root.to_path_buf()];
    for entry in std::fs::read_dir(root)? {
        roots.push(entry?.path());
    }
    for path in roots.into_iter().map(|root| root.join(name)).filter(|path| path.exists()) {
        found.insert(path.to_string_lossy().into_owned());
    }
    Ok(found)
}

/// Ids of all programs that the kernel has.
fn loaded_programs() -> anyhow::Result<BTreeSet<u64>> {
    let text = output(Command::new("bpftool").args(["-j", "prog", "show"]))?;
    let programs: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    Ok(programs.iter().filter_map(|program| program["id"].as_u64()).collect())
}

/// Ids of the programs whose pin is below the run-time directory.
fn pinned_programs(run: &str) -> anyhow::Result<BTreeSet<u64>> {
    let text = output(Command::new("bpftool").args(["-j", "-f", "link", "show"]))?;
    let links: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    let pinned = |link: &&serde_json::Value| {
        let pins = link["pinned"].as_array();
        pins.is_some_and(|pins| pins.iter().any(|pin| pin.as_str().is_some_and(|pin| pin.starts_with(run))))
    };
    Ok(links.iter().filter(pinned).filter_map(|link| link["prog_id"].as_u64()).collect())
}

fn names(json: &str, key: &str) -> anyhow::Result<BTreeSet<String>> {
    let rows: Vec<serde_json::Value> = serde_json::from_str(json)?;
    Ok(rows.iter().filter_map(|row| row[key].as_str().map(str::to_owned)).collect())
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
