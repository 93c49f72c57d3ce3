//! C1 and C2: ADD and DEL by executing the plugin, one by one and many at once, against the reference plugins bridge and host-local.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use weft_tests_harness::artifact;
use weft_tests_harness::netns::Netns;

use crate::report::{Row, Target};
use crate::stats::{Turns, estimate, quantile, there_and_back};

/// Where Debian's containernetworking-plugins lie.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";
/// Pods of one turn, one after the other.
const PODS: usize = 20;
/// Pods of one turn where several are attached at once: as many as at most are.
const CROWD: usize = 64;
/// How many at once.
const AT_ONCE: [usize; 3] = [2, 16, 64];

/// Ours and the reference in a node's namespace, with pods to attach.
struct Arena {
    sides: [Plugin; 2],
    host: Netns,
    pods: Vec<Netns>,
    _state: tempfile::TempDir,
}

/// C1 and C2.
pub(crate) fn run(names: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    if names.contains(&"C1") {
        rows.extend(one_by_one(rounds)?);
    }
    if names.contains(&"C2") {
        rows.extend(at_once(rounds)?);
    }
    Ok(rows)
}

fn one_by_one(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let arena = Arena::new(PODS)?;
    let measured = arena.measure::<4>(rounds, |side| turn(&arena.sides[side], &arena.host, &arena.pods))?;
    let names = ["C1 ADD p50", "C1 DEL p50", "C1 ADD p99", "C1 DEL p99"];
    let targets = [Target::AtLeast(5.0), Target::AtLeast(5.0), Target::None, Target::None];
    Ok(names
        .into_iter()
        .zip(targets)
        .zip(&measured)
        .map(|((name, target), sides)| row(name, sides, target))
        .collect())
}

/// How many times faster: the peer's time through ours.
fn row(name: &str, [ours, peer]: &[Vec<Turns>; 2], target: Target) -> Row {
    Row::times(name, "bridge + host-local", "ms", [ours, peer], target)
}

/// The time until the last of the pods is attached and detached, and how much longer than the others the slowest ADD takes.
fn at_once(rounds: usize) -> anyhow::Result<Vec<Row>> {
    let arena = Arena::new(CROWD)?;
    let mut rows = Vec::new();
    for workers in AT_ONCE {
        let slowest = std::cell::RefCell::new(Vec::new());
        let measured = arena.measure::<2>(rounds, |side| {
            let plugin = &arena.sides[side];
            let (adds, whole) = crowd(plugin, &arena, "ADD", workers)?;
            let (_, gone) = crowd(plugin, &arena, "DEL", workers)?;
            if side == 0 {
                slowest.borrow_mut().push(quantile(&adds, 1.0) / quantile(&adds, 0.5));
            }
            Ok([whole, gone])
        })?;
        let name = |verb: &str| format!("C2 {CROWD} {verb}, {workers} at once");
        rows.push(row(&name("ADD"), &measured[0], Target::AtLeast(5.0)));
        rows.push(row(&name("DEL"), &measured[1], Target::None));
        let slowest = estimate(&slowest.take());
        rows.push(Row::figure(
            &format!("{}, slowest ÷ median", name("ADD")),
            slowest,
            "×",
            Target::AtMost(3.0),
        ));
    }
    Ok(rows)
}

/// Calls for every pod, some at once. Milliseconds: each call, and all of them.
fn crowd(plugin: &Plugin, arena: &Arena, verb: &str, workers: usize) -> anyhow::Result<(Vec<f64>, f64)> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || -> anyhow::Result<Vec<f64>> {
        let mut took = Vec::new();
        while let Some(pod) = arena.pods.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            let begin = Instant::now();
            call(plugin, verb, &arena.host, pod)?;
            took.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        Ok(took)
    };
    let begin = Instant::now();
    let all: Vec<anyhow::Result<Vec<f64>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let broken = |_| Err(anyhow::anyhow!("a worker broke down"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(broken)).collect()
    });
    let whole = begin.elapsed().as_secs_f64() * 1e3;
    Ok((all.into_iter().collect::<anyhow::Result<Vec<_>>>()?.concat(), whole))
}

impl Arena {
    fn new(pods: usize) -> anyhow::Result<Self> {
        let state =
            tempfile::Builder::new().prefix("weft-bench-").tempdir().context("make a folder for leases")?;
        let sides = [ours(state.path())?, reference(state.path())?];
        let host = Netns::new("c1")?;
        let pods = (0..pods).map(|_| Netns::new("c1pod")).collect::<anyhow::Result<_>>()?;
        let arena = Self { sides, host, pods, _state: state };
        // The first ADD of each makes its bridge; that is no part of what is compared.
        for side in &arena.sides {
            turn(side, &arena.host, &arena.pods)?;
        }
        Ok(arena)
    }

    /// Each figure of a turn, for either side, round by round.
    fn measure<const N: usize>(
        &self,
        rounds: usize,
        turn: impl Fn(usize) -> anyhow::Result<[f64; N]>,
    ) -> anyhow::Result<Vec<[Vec<Turns>; 2]>> {
        let mut rows: Vec<[Vec<Turns>; 2]> = (0..N).map(|_| <[Vec<Turns>; 2]>::default()).collect();
        for _ in 0..rounds {
            let turns: Vec<(usize, [f64; N])> = there_and_back(self.sides.len())
                .map(|side| Ok((side, turn(side)?)))
                .collect::<anyhow::Result<_>>()?;
            for (figure, sides) in rows.iter_mut().enumerate() {
                for (side, all) in sides.iter_mut().enumerate() {
                    let of: Vec<f64> =
                        turns.iter().filter(|turn| turn.0 == side).map(|turn| turn.1[figure]).collect();
                    all.push(Turns(of[0], of[1]));
                }
            }
        }
        Ok(rows)
    }
}

/// A plugin with its configuration.
pub(crate) struct Plugin {
    pub(crate) program: PathBuf,
    pub(crate) config: Value,
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

pub(crate) fn call(plugin: &Plugin, verb: &str, host: &Netns, pod: &Netns) -> anyhow::Result<Vec<u8>> {
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
