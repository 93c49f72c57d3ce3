//! D3, D4, D7, D8, D9: a service proxy among thousands of Services. How soon a change, or a start, is seen by connections; what that
//! costs; whether any connection is lost or goes astray meanwhile.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::wait_until;

use crate::report::{Row, Target};
use crate::service::traffic::{Client, ask};
use crate::stage::program::{PATIENCE, Proxy, Whose};
use crate::stage::{self, BACKENDS, NAME, filler_endpoint, filler_name, pod, slice, vip};
use crate::stats::{as_f64, estimate, quantile};

/// Services among which a change is made.
const SERVICES: usize = 10_000;
/// Services of a cold start, and of the memory's larger measurement.
const MANY: usize = 30_000;
const FEW: usize = 1_000;
/// Changes of one round of D3: of weft, and of a peer that takes seconds for each; even, so that each goes to the other pod.
const FLIPS: usize = 50;
const PEER_FLIPS: usize = 4;
/// Changes of one round of D8, and the pause between two: five seconds of steady churn.
const CHANGES: usize = 1_000;
const PACE: Duration = Duration::from_millis(5);
/// Connections in a row that go to one of four backends by chance so seldom that nobody will see it.
const ALONE: usize = 32;
/// A connection that is not answered by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Connections of D9, unless the environment says another number.
const CONNECTIONS: u64 = 100_000;
/// Clients of D9.
const CLIENTS: usize = 3;

fn number<T: std::str::FromStr>(variable: &str) -> Option<T> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// Overrides the number of Services, for a look in passing.
fn size(default: usize) -> usize {
    number("WEFT_BENCH_SERVICES").unwrap_or(default)
}

/// Overrides the pause between two changes: what a change costs while caches are warm.
fn pace() -> Duration {
    number("WEFT_BENCH_PACE_MICROS").map_or(PACE, Duration::from_micros)
}

fn name_of(whose: Whose) -> &'static str {
    match whose {
        Whose::Weft => "weft",
        Whose::KubeProxy => "kube-proxy",
    }
}

/// A row of ours has the aim; a peer's explains it.
fn aim(whose: Whose, target: Target) -> Target {
    if whose == Whose::Weft { target } else { Target::None }
}

/// Starts the proxy and waits until the Service answers from all of `backends`.
fn started(whose: Whose, services: usize) -> anyhow::Result<Proxy> {
    let mut proxy = Proxy::new(whose, services)?;
    let begin = proxy.start()?;
    proxy.wait_until_listed(begin)?;
    let served = proxy.node.client().and_then(|client| client.until(vip(), &stage::pods(), PATIENCE));
    served.with_context(|| format!("{} does not serve: {}", name_of(whose), proxy.said()))?;
    proxy.api.wait_for_watch("endpointslices")?;
    let took = begin.elapsed().as_secs_f64();
    eprintln!("{} serves {services} Services after {took:.2} s", name_of(whose));
    Ok(proxy)
}

/// D3: microseconds from an event's first byte on the watch to the first connection that the new backend serves.
pub(crate) fn follow(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for whose in Whose::all() {
        let proxy = started(whose, size(SERVICES))?;
        let client = proxy.node.client()?;
        settle(&proxy, &client, pod(1))?;
        let flips = if whose == Whose::Weft { FLIPS } else { PEER_FLIPS };
        let (mut p50, mut p99) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let micros = (0..flips).map(|number| flip(&proxy, &client, pod(number % 2)));
            let micros = micros.collect::<anyhow::Result<Vec<f64>>>()?;
            p50.push(quantile(&micros, 0.5) / 1e3);
            p99.push(quantile(&micros, 0.99) / 1e3);
        }
        let name =
            |part: &str| format!("D3 change on the watch → new backend serves, {part}, {}", name_of(whose));
        rows.push(Row::figure(&name("p50"), estimate(&p50), "ms", Target::None));
        rows.push(Row::figure(&name("p99"), estimate(&p99), "ms", aim(whose, Target::AtMost(2.0))));
    }
    Ok(rows)
}

/// Makes a pod the only backend among others that serve until then, and waits until that is so: a change to one that serves anyway
/// could not be timed.
fn settle(proxy: &Proxy, client: &Client, to: Ipv4Addr) -> anyhow::Result<()> {
    proxy.api.event("endpointslices", "MODIFIED", &slice(NAME, &[to], proxy.api.next_revision()))?;
    let mut in_a_row = 0;
    wait_until("one backend serves alone", PATIENCE, || {
        in_a_row = if client.ask(vip())? == to { in_a_row + 1 } else { 0 };
        Ok((in_a_row == ALONE).then_some(()))
    })
}

/// Makes a pod the only backend; microseconds until a connection is served by it. From then on none is served by another.
fn flip(proxy: &Proxy, client: &Client, to: Ipv4Addr) -> anyhow::Result<f64> {
    let object = slice(NAME, &[to], proxy.api.next_revision());
    let begin = proxy.api.event("endpointslices", "MODIFIED", &object)?;
    let first = client.until_first(vip(), to, PATIENCE).with_context(|| proxy.said())?;
    for _ in 0..5 {
        let served = client.ask(vip())?;
        ensure!(served == to, "{served} serves after {to} had");
    }
    Ok((first - begin).as_secs_f64() * 1e6)
}

/// D4: milliseconds from the end of the lists to an answer by the last Service, the maps empty before.
pub(crate) fn cold_start(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for whose in Whose::all() {
        let mut proxy = Proxy::new(whose, size(MANY))?;
        let client = proxy.node.client()?;
        let (mut after_list, mut after_start) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let begin = proxy.start()?;
            // Not waited for: the wait looks only now and then.
            let answered = client.until_any(vip(), PATIENCE).with_context(|| proxy.said())?;
            let listed = proxy.api.listed_since(begin).context("it serves before it has a list")?;
            after_list.push(answered.saturating_duration_since(listed).as_secs_f64() * 1e3);
            after_start.push((answered - begin).as_secs_f64() * 1e3);
            proxy.clean()?;
        }
        let name =
            |part: &str| format!("D4 {part} → last of {} Services answers, {}", size(MANY), name_of(whose));
        let target = aim(whose, Target::AtMost(150.0));
        rows.push(Row::figure(&name("list is in"), estimate(&after_list), "ms", target));
        rows.push(Row::figure(&name("process starts"), estimate(&after_start), "ms", Target::None));
    }
    Ok(rows)
}

/// D7: bytes for each Service more, user and kernel, between a few and many.
pub(crate) fn memory(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let (few, many) = (size(FEW).min(FEW), size(MANY));
    let more = as_f64(many.saturating_sub(few));
    ensure!(more > 0.0, "there must be more than {few} Services");
    let mut rows = Vec::new();
    for whose in Whose::all() {
        let (mut user, mut kernel) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let mut bytes = [(0.0, 0.0); 2];
            for (slot, count) in bytes.iter_mut().zip([few, many]) {
                let proxy = started(whose, count)?;
                *slot = (settled_bytes(&proxy)?, proxy.map_bytes()?);
            }
            user.push((bytes[1].0 - bytes[0].0) / more);
            kernel.push((bytes[1].1 - bytes[0].1) / more);
        }
        let both: Vec<f64> = user.iter().zip(&kernel).map(|(user, kernel)| user + kernel).collect();
        let name = |part: &str| format!("D7 {part} per Service, {few} → {many}, {}", name_of(whose));
        rows.push(Row::figure(&name("resident memory"), estimate(&user), "B", Target::None));
        if whose == Whose::Weft {
            rows.push(Row::figure(&name("eBPF maps"), estimate(&kernel), "B", Target::None));
            rows.push(Row::figure(&name("both"), estimate(&both), "B", Target::AtMost(512.0)));
        }
    }
    Ok(rows)
}

/// Resident bytes once they have not moved by a megabyte for two seconds.
fn settled_bytes(proxy: &Proxy) -> anyhow::Result<f64> {
    let (mut last, mut since) = (proxy.resident_bytes()?, Instant::now());
    wait_until("memory rests", PATIENCE, || {
        let now = proxy.resident_bytes()?;
        if (now - last).abs() > 1e6 {
            (last, since) = (now, Instant::now());
        }
        Ok((since.elapsed() > Duration::from_secs(2)).then_some(last))
    })
}

/// D8: milliseconds of processor time for a thousand changes of endpoints.
pub(crate) fn cost(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut medians = Vec::new();
    let mut rows = Vec::new();
    for whose in Whose::all() {
        let proxy = started(whose, size(SERVICES))?;
        let client = proxy.node.client()?;
        settle(&proxy, &client, pod(1))?;
        let mut millis = Vec::new();
        for round in 0..rounds {
            let begin = proxy.seconds()?;
            churn(&proxy, round, CHANGES)?;
            // What is written last is done last.
            flip(&proxy, &client, pod(round % 2))?;
            millis.push((proxy.seconds()? - begin) * 1e3);
        }
        let name = format!(
            "D8 CPU of {CHANGES} EndpointSlice changes {:?} apart at {} Services, {}",
            pace(),
            size(SERVICES),
            name_of(whose)
        );
        let estimate = estimate(&millis);
        medians.push(estimate.median);
        rows.push(Row::figure(&name, estimate, "ms", Target::None));
    }
    if let [ours, peer] = medians.as_slice() {
        let ratio = crate::stats::Estimate { median: peer / ours, low: peer / ours, high: peer / ours };
        rows.push(Row::figure("D8 kube-proxy's CPU ÷ weft's", ratio, "×", Target::AtLeast(200.0)));
    }
    Ok(rows)
}

/// Changes of other Services, one after the other: an endpoint goes, another comes.
fn churn(proxy: &Proxy, round: usize, changes: usize) -> anyhow::Result<()> {
    let fillers = size(SERVICES).saturating_sub(1).max(1);
    for change in 0..changes {
        let number = (round * changes + change) * 7 % fillers;
        let mut endpoints: Vec<_> = (0..BACKENDS).map(|endpoint| filler_endpoint(number, endpoint)).collect();
        endpoints[change % BACKENDS] = filler_endpoint(number, BACKENDS);
        if round % 2 == 1 {
            endpoints.reverse();
        }
        let object = slice(&filler_name(number), &endpoints, proxy.api.next_revision());
        proxy.api.event("endpointslices", "MODIFIED", &object)?;
        std::thread::park_timeout(pace());
    }
    Ok(())
}

/// D9: connections that are lost, or served by who is no backend, while all of that goes on and the process is killed and started
/// again.
pub(crate) fn losses(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let wanted = number("WEFT_BENCH_CONNECTIONS").unwrap_or(CONNECTIONS);
    let mut proxy = started(Whose::Weft, size(SERVICES))?;
    let client = proxy.node.client()?;
    let steady = Steady::start(&proxy)?;
    let mut round = 0;
    while steady.count.done.load(Ordering::Relaxed) < wanted || round < rounds {
        for number in 0..FLIPS {
            // The steady clients' backends stay; one more comes and goes.
            let extra = (number % 2 == 0).then(|| pod(3));
            let backends: Vec<_> = [pod(0), pod(1)].into_iter().chain(extra).collect();
            proxy.api.event(
                "endpointslices",
                "MODIFIED",
                &slice(NAME, &backends, proxy.api.next_revision()),
            )?;
            client.ask(vip())?;
        }
        churn(&proxy, round, CHANGES / 10)?;
        proxy.api.replace(
            "endpointslices",
            size(SERVICES).saturating_sub(1),
            &slice(NAME, &[pod(0), pod(1)], 1),
        );
        proxy.kill()?;
        client.ask(vip()).context("nobody serves while the process is dead")?;
        let begin = proxy.start()?;
        proxy.wait_until_listed(begin)?;
        proxy.api.wait_for_watch("endpointslices")?;
        round += 1;
    }
    let (done, lost, astray) = steady.stop()?;
    eprintln!("D9: {done} connections in {round} rounds, {lost} lost, {astray} served by who is no backend");
    let exact = |value: u64| estimate(&[as_f64(usize::try_from(value).unwrap_or(usize::MAX))]);
    Ok(vec![
        Row::figure(&format!("D9 connections lost of {done}"), exact(lost), "", Target::AtMost(0.0)),
        Row::figure(&format!("D9 connections misrouted of {done}"), exact(astray), "", Target::AtMost(0.0)),
    ])
}

#[derive(Default)]
struct Count {
    stop: AtomicBool,
    done: AtomicU64,
    lost: AtomicU64,
    astray: AtomicU64,
}

/// Clients that connect without end. Pods 0, 1 and, now and then, 3 are backends; pod 2 never is.
struct Steady {
    count: Arc<Count>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Steady {
    fn start(proxy: &Proxy) -> anyhow::Result<Self> {
        let client = proxy.node.client()?;
        proxy.api.event(
            "endpointslices",
            "MODIFIED",
            &slice(NAME, &[pod(0), pod(1)], proxy.api.next_revision()),
        )?;
        let never = pod(2);
        wait_until("pod 2 is out", PATIENCE, || {
            let asked = (0..40).map(|_| client.ask(vip())).collect::<anyhow::Result<Vec<_>>>()?;
            Ok((!asked.contains(&never)).then_some(()))
        })?;
        let count = Arc::new(Count::default());
        let mut threads = Vec::new();
        for _ in 0..CLIENTS {
            let count = Arc::clone(&count);
            threads.push(proxy.node.netns.thread(move || {
                while !count.stop.load(Ordering::Relaxed) {
                    match ask(vip(), LOST_AFTER) {
                        Ok(served) if served == never || !stage::pods().contains(&served) => {
                            count.astray.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(_) => {}
                        Err(error) => {
                            eprintln!("D9: lost: {error:#}");
                            count.lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    count.done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })?);
        }
        Ok(Self { count, threads })
    }

    fn stop(self) -> anyhow::Result<(u64, u64, u64)> {
        self.count.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|panic| anyhow::anyhow!("a client panicked: {panic:?}"))??;
        }
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ensure!(read(&self.count.done) > 0, "no connection was made");
        Ok((read(&self.count.done), read(&self.count.lost), read(&self.count.astray)))
    }
}
