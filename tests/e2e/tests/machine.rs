//! A whole machine becomes a cluster and is a machine again: what the first command of the README does, on a Debian that nothing was done to.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::{NEEDS, image_archive};
use weft_tests_harness::{require, wait_until, weft_binary, workspace};

const PATIENCE: Duration = Duration::from_secs(60);
const DATA_DIR: &str = "/var/lib/weft";
const NODE_PORT: u16 = 30_080;
/// What `weft net check` makes its pods of, and the sample its own.
const IMAGES: [&str; 2] = ["busybox", "nginx"];

#[test]
#[ignore = "takes the machine for itself: `cargo xtask vm` runs it in an emulated one"]
fn a_machine_becomes_a_cluster_and_is_a_machine_again() -> anyhow::Result<()> {
    if !require("machine::whole", NEEDS) || !require("machine::whole", &["bpftool", "nft"]) {
        return Ok(());
    }
    let before = look()?;
    weft(&["up", "--detach"])?;
    if let Err(error) = use_it() {
        // Whoever reads of it can't look at the machine any more.
        let doctor = Command::new(weft_binary().map_err(anyhow::Error::msg)?).arg("doctor").output()?;
        return Err(error.context(format!("weft doctor says:\n{}", String::from_utf8_lossy(&doctor.stdout))));
    }
    let busy = look()?;
    // Else the looking itself would be blind.
    for part in ["processes", "mounts", "cgroups", "devices", "programs", "folders"] {
        ensure!(busy[part] != before[part], "a running cluster shows no {part}: {busy:#?}");
    }
    weft(&["down", "--purge"])?;
    // The kernel frees programs a moment after their last user has gone.
    wait_until("the machine is as before", PATIENCE, || {
        let after = look()?;
        for (part, now) in &after {
            let left: Vec<_> = now.symmetric_difference(&before[part]).collect();
            ensure!(left.is_empty(), "other {part}: {left:#?}");
        }
        Ok(Some(()))
    })
}

/// Brings the sample up, asks it from outside and by its Service, and has weft look at itself.
fn use_it() -> anyhow::Result<()> {
    kubectl(&["wait", "nodes", "--all", "--for=condition=Ready", "--timeout=60s"])?;
    for image in IMAGES {
        weft(&["image", "import", &image_archive(image)?.to_string_lossy()])?;
    }
    let sample = workspace().join("docs/samples/hello.yaml");
    kubectl(&["apply", "-f", &sample.to_string_lossy()])?;
    kubectl(&["rollout", "status", "deployment/hello", "--timeout=120s"])?;
    let pods = kubectl(&["get", "pods", "-l", "app=hello", "-o", "jsonpath={.items[*].metadata.name}"])?;
    let pods: BTreeSet<&str> = pods.split_whitespace().collect();
    ensure!(pods.len() == 2, "{pods:?}");
    let node = kubectl(&["get", "nodes", "-o", "jsonpath={.items[0].status.addresses[0].address}"])?;
    let service = kubectl(&["get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"])?;
    for (ip, port) in [(node, NODE_PORT), (service, 80)] {
        let to = SocketAddr::new(ip.trim().parse().with_context(|| ip.clone())?, port);
        let said = wait_until("the sample answers", PATIENCE, || hostname(to).map(Some))?;
        ensure!(pods.contains(said.trim()), "{to} answers {said:?}, not one of {pods:?}");
    }
    weft(&["net", "check"])?;
    let said = weft(&["doctor"])?;
    ensure!(said.contains(" 0 to look at, 0 broken"), "{said}");
    Ok(())
}

/// The name of the pod that answers.
fn hostname(to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.contains(" 200 "), "{to}: {head}");
    Ok(body.to_owned())
}

fn weft(args: &[&str]) -> anyhow::Result<String> {
    output(Command::new(weft_binary().map_err(anyhow::Error::msg)?).args(args))
}

fn kubectl(args: &[&str]) -> anyhow::Result<String> {
    let config = Path::new(DATA_DIR).join("admin.kubeconfig");
    output(Command::new("kubectl").env("KUBECONFIG", config).args(args))
}

/// What a cluster leaves traces in.
fn look() -> anyhow::Result<BTreeMap<&'static str, BTreeSet<String>>> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let rules = output(Command::new("nft").args(["list", "ruleset"]))?;
    let lines = |text: &str| text.lines().map(str::to_owned).collect();
    let ip = |args: &[&str]| output(Command::new("ip").args(args)).map(|text| lines(&text));
    Ok(BTreeMap::from([
        ("processes", processes()?),
        ("mounts", lines(&mounts)),
        ("rules", lines(&rules)),
        ("devices", ip(&["-br", "link"])?),
        ("addresses", ip(&["-br", "addr"])?),
        ("routes", ip(&["route", "show", "table", "all"])?),
        ("rules of routes", ip(&["rule"])?),
        ("cgroups", folders(Path::new("/sys/fs/cgroup"))?),
        ("programs", programs()?),
        ("folders", folders_in(&[DATA_DIR, "/run", "/opt", "/etc/cni"])?),
    ]))
}

/// Programs that run, the kernel's own threads left out.
fn processes() -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc")? {
        let line = std::fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
        if !line.is_empty() {
            found.insert(line);
        }
    }
    Ok(found)
}

/// Ids of all programs that the kernel has.
fn programs() -> anyhow::Result<BTreeSet<String>> {
    let text = output(Command::new("bpftool").args(["-j", "prog", "show"]))?;
    let programs: Vec<serde_json::Value> = serde_json::from_str(&text)?;
    Ok(programs.iter().map(|program| program["id"].to_string()).collect())
}

/// All folders below one.
fn folders(root: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                found.insert(entry.path().to_string_lossy().into_owned());
                todo.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// What lies in some folders, if these are there.
fn folders_in(places: &[&str]) -> anyhow::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for place in places.iter().map(PathBuf::from).filter(|place| place.is_dir()) {
        for entry in std::fs::read_dir(place)? {
            found.insert(entry?.path().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}
