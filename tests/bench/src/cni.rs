//! C1: ADD and DEL by executing the plugin, against the reference plugins bridge and host-local.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use weft_tests_harness::artifact;
use weft_tests_harness::netns::Netns;

use crate::report::{Row, Target};
use crate::stats::{Turns, compare, quantile, there_and_back};

/// Where Debian's containernetworking-plugins lie.
const REFERENCE: &str = "/usr/lib/cni";
/// Pods of one turn.
const PODS: usize = 20;

/// C1.
pub(crate) fn run(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let state =
        tempfile::Builder::new().prefix("weft-bench-").tempdir().context("make a folder for leases")?;
    let sides = [ours(state.path())?, reference(state.path())?];
    let host = Netns::new("c1")?;
    let pods: Vec<Netns> = (0..PODS).map(|_| Netns::new("c1pod")).collect::<anyhow::Result<_>>()?;
    // The first ADD of each makes its bridge; that is no part of what is compared.
    for side in &sides {
        turn(side, &host, &pods)?;
    }
    let mut rows: [[Vec<Turns>; 2]; 4] = Default::default();
    for _ in 0..rounds {
        let turns: Vec<(usize, [f64; 4])> = there_and_back(sides.len())
            .map(|side| Ok((side, turn(&sides[side], &host, &pods)?)))
            .collect::<anyhow::Result<_>>()?;
        for (figure, sides) in rows.iter_mut().enumerate() {
            for (side, all) in sides.iter_mut().enumerate() {
                let of: Vec<f64> =
                    turns.iter().filter(|turn| turn.0 == side).map(|turn| turn.1[figure]).collect();
                all.push(Turns(of[0], of[1]));
            }
        }
    }
    let names = ["C1 ADD p50", "C1 DEL p50", "C1 ADD p99", "C1 DEL p99"];
    let targets = [Target::AtLeast(5.0), Target::AtLeast(5.0), Target::None, Target::None];
    let row = |((name, target), [ours, peer]): ((&str, Target), &[Vec<Turns>; 2])| {
        // How many times faster: the peer's time through ours.
        let mut compared = compare(peer, ours);
        (compared.left, compared.right) = (compared.right, compared.left);
        Row::compared(name, "bridge + host-local", "ms", &compared, target)
    };
    Ok(names.into_iter().zip(targets).zip(&rows).map(row).collect())
}

/// A plugin with its configuration.
struct Plugin {
    program: PathBuf,
    config: Value,
}

fn ours(state: &Path) -> anyhow::Result<Plugin> {
    let program = artifact("weft-cni").map_err(anyhow::Error::msg)?;
    let config = json!({
        "cniVersion": "1.0.0", "name": "ours", "type": "weft-cni", "bridge": "bench0", "mtu": 1450,
        "ipam": {"subnet": "10.42.0.0/24", "gateway": "10.42.0.1"}, "stateDir": state.join("ours"),
    });
    Ok(Plugin { program, config })
}

/// The reference with the same features: gateway on the bridge, default route, hairpin.
fn reference(state: &Path) -> anyhow::Result<Plugin> {
    let program = Path::new(REFERENCE).join("bridge");
    ensure!(program.is_file(), "no {}; install containernetworking-plugins", program.display());
    let config = json!({
        "cniVersion": "1.0.0", "name": "peer", "type": "bridge", "bridge": "bench1", "mtu": 1450,
        "isDefaultGateway": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "subnet": "10.43.0.0/24", "gateway": "10.43.0.1", "dataDir": state.join("peer")},
    });
    Ok(Plugin { program, config })
}

/// Attaches every pod, looks that it is attached, detaches every pod. Milliseconds: p50 of ADD and DEL, p99 of ADD and DEL.
fn turn(plugin: &Plugin, host: &Netns, pods: &[Netns]) -> anyhow::Result<[f64; 4]> {
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    let mut answers = Vec::new();
    for pod in pods {
        let begin = Instant::now();
        let answer = call(plugin, "ADD", host, pod)?;
        adds.push(begin.elapsed().as_secs_f64() * 1e3);
        answers.push(answer);
    }
    for (pod, answer) in pods.iter().zip(&answers) {
        check_attached(pod, answer)?;
    }
    for pod in pods {
        let begin = Instant::now();
        call(plugin, "DEL", host, pod)?;
        dels.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    for pod in pods {
        ensure!(addresses(pod)?.is_empty(), "DEL left an address in {}", pod.name());
    }
    Ok([quantile(&adds, 0.5), quantile(&dels, 0.5), quantile(&adds, 0.99), quantile(&dels, 0.99)])
}

fn call(plugin: &Plugin, verb: &str, host: &Netns, pod: &Netns) -> anyhow::Result<Vec<u8>> {
    let mut command = host.command(&plugin.program)?;
    command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", pod.name()).env("CNI_IFNAME", "eth0");
    command
        .env("CNI_NETNS", pod.path())
        .env("CNI_PATH", REFERENCE)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start a plugin")?;
    child.stdin.take().context("no input")?.write_all(plugin.config.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{verb} by {}: {}", plugin.program.display(), String::from_utf8_lossy(&output.stdout));
    }
    Ok(output.stdout)
}

/// The pod has the address that ADD answered, and a default route.
fn check_attached(pod: &Netns, answer: &[u8]) -> anyhow::Result<()> {
    let answer: Value = serde_json::from_slice(answer).context("ADD's answer is no JSON")?;
    let address = answer["ips"][0]["address"].as_str().context("ADD answered no address")?;
    let present = addresses(pod)?;
    ensure!(present == [address], "ADD answered {address}; the pod has {present:?}");
    let routes = ip(&["-n", pod.name(), "route", "show", "default"])?;
    ensure!(routes.contains("via"), "the pod has no default route");
    Ok(())
}

fn addresses(pod: &Netns) -> anyhow::Result<Vec<String>> {
    let links: Value =
        serde_json::from_str(&ip(&["-j", "-n", pod.name(), "-4", "addr", "show", "scope", "global"])?)?;
    let infos = links
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|link| link["addr_info"].as_array().into_iter().flatten());
    Ok(infos
        .map(|info| format!("{}/{}", info["local"].as_str().unwrap_or_default(), info["prefixlen"]))
        .collect())
}

fn ip(args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(args).output().context("run ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
