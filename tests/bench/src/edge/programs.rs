//! D5: what the packet programs cost, against their map operations alone.
//!
//! A program is run many times on one frame, and finds it each time as it left it. So the flow is one that changes nothing: all is
//! looked up, computed and written, and the next run sees the same frame.

use anyhow::{Context as _, ensure};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::{Program, TestRun as _, TestRunOptions, TestRunResult};
use weft_cni_netlink::namespace::within;
use weft_ebpf_abi::{Address, BackendKey, BackendValue, FlowKey, FlowValue, Port, UDP, names};
use zerocopy::IntoBytes as _;

use super::place::{CLIENT, POD, POD_PORT, Place};
use super::{Bench, FIRST_PORT};
use crate::report::{Row, Target};
use crate::stats::{Turns, compare, there_and_back};

/// Runs of one turn.
const RUNS: u32 = 500_000;
/// Verdicts.
const TC_OK: u32 = 0;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
const TC_REDIRECT: u32 = 7;

/// Program, whether it is weft's, and its verdict.
const PROGRAMS: [(&str, bool, u32); 4] = [
    ("weft_ingress", true, TC_REDIRECT),
    ("bench_maps_tc", false, TC_OK),
    ("weft_xdp", true, XDP_REDIRECT),
    ("bench_maps_xdp", false, XDP_PASS),
];

pub(super) fn measure(place: &Place, bench: &mut Bench, rounds: usize) -> anyhow::Result<Vec<Row>> {
    place.xdp(true)?;
    let frame = enter_flow(place, bench)?;
    let mut all: [Vec<Turns>; PROGRAMS.len()] = Default::default();
    for _ in 0..rounds {
        let mut turns: [Vec<f64>; PROGRAMS.len()] = Default::default();
        for one in there_and_back(PROGRAMS.len()) {
            turns[one].push(turn(place, bench, PROGRAMS[one], &frame)?);
        }
        for (kept, taken) in all.iter_mut().zip(turns) {
            kept.push(Turns(taken[0], taken[1]));
        }
    }
    let row = |name, ours: usize| {
        let compared = compare(&all[ours], &all[ours + 1]);
        Row::compared(name, "its map operations", "ns", &compared, Target::AtMost(1.25))
    };
    Ok(vec![row("D5 tc program, known flow", 0), row("D5 XDP program, known flow", 2)])
}

/// Processor nanoseconds of one run.
fn turn(
    place: &Place,
    bench: &Bench,
    (name, ours, verdict): (&str, bool, u32),
    frame: &[u8],
) -> anyhow::Result<f64> {
    let program = if ours { place.programs.program(name) } else { bench.0.program(name) };
    let program = program.with_context(|| format!("no {name}"))?;
    let mut out = vec![0; frame.len()];
    let once = within(&place.node.path(), || run(program, frame, Some(&mut out), 1))??;
    ensure!(once.return_value == verdict, "{name} answers {}", once.return_value);
    // All but the hardware addresses, which XDP sets.
    ensure!(out[12..] == frame[12..], "{name} changed the frame");
    let (many, took) = within(&place.node.path(), || {
        let begin = used()?;
        let many = run(program, frame, None, RUNS)?;
        Ok::<_, anyhow::Error>((many, used()? - begin))
    })??;
    ensure!(many.return_value == verdict, "{name} answers {} in the end", many.return_value);
    Ok(took / f64::from(RUNS))
}

/// Nanoseconds that this thread has had a processor: the clock on the wall would count others' turns.
fn used() -> anyhow::Result<f64> {
    let used = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID.now().context("ask for processor time")?;
    Ok(std::time::Duration::from(used).as_secs_f64() * 1e9)
}

fn run(
    program: &Program,
    frame: &[u8],
    out: Option<&mut [u8]>,
    repeat: u32,
) -> anyhow::Result<TestRunResult> {
    let options = TestRunOptions { data_in: Some(frame), data_out: out, repeat, ..TestRunOptions::new() };
    let result = if let Program::Xdp(program) = program {
        program.test_run(options)
    } else if let Program::SchedClassifier(program) = program {
        program.test_run(options)
    } else {
        anyhow::bail!("a program of another kind")
    };
    result.context("run a program")
}

/// Enters a flow of the client to the pod that translates to itself. Answers its frame.
fn enter_flow(place: &Place, bench: &mut Bench) -> anyhow::Result<Vec<u8>> {
    let [source, destination] = [CLIENT, POD].map(Address::from);
    let ports = [FIRST_PORT, POD_PORT].map(Port::new);
    let key = FlowKey {
        source,
        destination,
        source_port: ports[0],
        destination_port: ports[1],
        protocol: UDP,
        pad: [0; 3],
    };
    let backend = BackendKey { address: destination, port: ports[1], protocol: UDP, pad: 0 };
    let pinned = |name: &str| MapData::from_pin(place.pins.join("maps").join(name));
    let backends: HashMap<_, [u8; size_of::<BackendKey>()], [u8; size_of::<BackendValue>()]> =
        HashMap::try_from(Map::HashMap(pinned(names::BACKENDS)?))?;
    let known: BackendValue = zerocopy::transmute!(backends.get(&zerocopy::transmute!(backend), 0)?);
    let now = nix::time::ClockId::CLOCK_MONOTONIC.now()?.tv_sec();
    let flow = FlowValue {
        source,
        destination,
        source_port: ports[0],
        destination_port: ports[1],
        ifindex: place.bridge,
        generation: known.generation,
        flags: 0,
        last_seen: u32::try_from(now)?,
    };
    let mut flows: HashMap<_, [u8; size_of::<FlowKey>()], [u8; size_of::<FlowValue>()]> =
        HashMap::try_from(Map::LruHashMap(pinned(names::FLOWS)?))?;
    let entry: ([u8; size_of::<FlowKey>()], [u8; size_of::<FlowValue>()]) =
        (zerocopy::transmute!(key), zerocopy::transmute!(flow));
    flows.insert(entry.0, entry.1, 0)?;
    let mut keys = [0; 80];
    let parts = [key.as_bytes(), backend.as_bytes(), destination.as_bytes(), &place.pod_port.to_ne_bytes()];
    keys.copy_from_slice(&parts.concat());
    bench.put("KEYS", 0, keys)?;
    Ok(place.frame(FIRST_PORT, (POD, POD_PORT)))
}
