//! D5 and D6: packets from outside to a NodePort whose pod is on the node, and what the programs cost of their map operations.
//!
//! One processor does all: a program run by the kernel on frames of its own sends them out of the client's device; what the node
//! and the pod's end do with them follows in the same thread. So packets per second are packets per second and core, of sender,
//! node and pod together; the sender's part is measured too (frames are dropped where they come in) and can be taken off. Frames reach the
//! node as a driver has them, without a buffer of the stack.

mod place;
mod programs;
mod rules;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use aya::Ebpf;
use aya::maps::{Array, PerCpuArray};
use aya::programs::xdp::XdpMode;
use aya::programs::{
    Program, SchedClassifier, TcAttachType, TestRun as _, TestRunAttrs, TestRunOptions, Xdp,
};
use weft_cni_netlink::namespace::within;
use weft_tests_harness::artifact;

use crate::report::{Row, Target};
use crate::service::iptables::Rules;
use crate::stats::{Turns, compare, there_and_back};
use place::{FRAME_BYTES, NODE, NODE_PORT, POD, POD_PORT, Place};

/// Packets of one turn, and those before it that begin the flows.
const PACKETS: u32 = 300_000;
const BEFORE: u32 = 30_000;
/// Packets that the sender makes at once.
const BATCH: u32 = 64;
/// A packet that has not arrived by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Port of the first flow.
const FIRST_PORT: u16 = 5_000;

/// D5 and D6.
pub(crate) fn run(ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let processor = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    let last = (0..nix::sched::CpuSet::count()).rev().find(|&cpu| processor.is_set(cpu).unwrap_or(false));
    let mut one = nix::sched::CpuSet::new();
    one.set(last.context("no processor to run on")?)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one)?;
    let rows = measure(ids, rounds);
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &processor)?;
    rows
}

fn measure(ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let place = Place::build()?;
    let mut bench = Bench::load(&place)?;
    let mut rows = Vec::new();
    if ids.contains(&"D5") {
        rows.extend(programs::measure(&place, &mut bench, rounds)?);
    }
    if ids.contains(&"D6") {
        rows.extend(packets(&place, &mut bench, rounds)?);
    }
    Ok(rows)
}

/// Who carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Nobody: they are dropped where they come in.
    Sender,
    /// A program that redirects every frame to the pod as it is.
    Raw,
    Xdp,
    Tc,
    Iptables,
}

const SIDES: [Side; 5] = [Side::Sender, Side::Raw, Side::Xdp, Side::Tc, Side::Iptables];

impl Side {
    /// The benchmark's own program that carries.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Sender => Some("bench_drop"),
            Self::Raw => Some("bench_redirect"),
            Self::Xdp | Self::Tc | Self::Iptables => None,
        }
    }
}

/// The benchmark's own programs.
struct Bench(Ebpf);

impl Bench {
    fn load(place: &Place) -> anyhow::Result<Self> {
        let object = std::fs::read(artifact("bench.bpf.o").map_err(anyhow::Error::msg)?)?;
        let mut ebpf = aya::EbpfLoader::new()
            .btf(None)
            .default_map_pin_directory(place.pins.join("maps"))
            .load(&object)
            .context("load the benchmark's programs")?;
        for (name, program) in ebpf.programs_mut() {
            let loaded = if let Program::Xdp(program) = program {
                program.load()
            } else if let Program::SchedClassifier(program) = program {
                program.load()
            } else {
                continue;
            };
            loaded.with_context(|| format!("load {name}"))?;
        }
        let mut bench = Self(ebpf);
        let frame = place.frame(FIRST_PORT, (NODE, NODE_PORT));
        let template: [u8; FRAME_BYTES] = frame.try_into().ok().context("a frame of another length")?;
        bench.put("TEMPLATE", 0, template)?;
        bench.put("SETTINGS", 0, place.pod_port)?;
        let sink: &mut SchedClassifier = bench.0.program_mut("bench_sink").context("no sink")?.try_into()?;
        within(&place.pod.path(), || sink.attach("eth0", TcAttachType::Ingress))??;
        Ok(bench)
    }

    fn put<T: aya::Pod>(&mut self, map: &str, index: u32, value: T) -> anyhow::Result<()> {
        let map = self.0.map_mut(map).context("a map is missing")?;
        Ok(Array::<_, T>::try_from(map)?.set(index, value, 0)?)
    }

    fn xdp(&mut self, name: &str) -> anyhow::Result<&mut Xdp> {
        Ok(self.0.program_mut(name).with_context(|| format!("no {name}"))?.try_into()?)
    }

    /// Packets that were taken as they should be, and others.
    fn counts(&self) -> anyhow::Result<[u64; 2]> {
        let map = self.0.map("COUNTS").context("a map is missing")?;
        let counts = PerCpuArray::<_, u64>::try_from(map)?;
        Ok([counts.get(&0, 0)?.iter().sum(), counts.get(&1, 0)?.iter().sum()])
    }

    /// Sends, and waits until all have arrived where the side brings them. Answers nanoseconds for each.
    fn send(&mut self, place: &Place, packets: u32) -> anyhow::Result<f64> {
        let frame = [0_u8; FRAME_BYTES];
        let length = u32::try_from(FRAME_BYTES)?;
        // `struct xdp_md`: data, its end, metadata, the device that the frames seem to come from, its queue, none to leave by.
        let context = [0, length, 0, place.client_device, 0, 0].map(u32::to_ne_bytes).concat();
        let [before, wrong_before] = self.counts()?;
        let begin = Instant::now();
        let sender = self.xdp("bench_send")?;
        let run = || {
            sender.test_run(TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(&context),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            })
        };
        within(&place.client.path(), run)?.context("send")?;
        loop {
            let [now, wrong] = self.counts()?;
            ensure!(wrong == wrong_before, "{} packets are not as they should be", wrong - wrong_before);
            if now - before >= u64::from(packets) {
                return Ok(begin.elapsed().as_secs_f64() * 1e9 / f64::from(packets));
            }
            ensure!(begin.elapsed() < LOST_AFTER, "{} of {packets} packets arrived", now - before);
        }
    }

    /// One turn of one side: nanoseconds for each packet.
    fn turn(&mut self, place: &Place, side: Side) -> anyhow::Result<f64> {
        let (address, port) = if side == Side::Raw { (NODE, NODE_PORT) } else { (POD, POD_PORT) };
        self.put("SETTINGS", 1, u32::from_ne_bytes(address.octets()))?;
        self.put("SETTINGS", 2, u32::from(port))?;
        place.xdp(side == Side::Xdp)?;
        place.tc(matches!(side, Side::Xdp | Side::Tc))?;
        let _rules = if side == Side::Iptables {
            Some(Rules::load_text(&place.node, &rules::text(NODE_PORT, POD, POD_PORT))?)
        } else {
            None
        };
        let mut attached = None;
        if let Some(name) = side.program() {
            let program = self.xdp(name)?;
            attached = Some((name, within(&place.node.path(), || program.attach("up0", XdpMode::Driver))??));
        }
        let took = self.send(place, BEFORE).and_then(|_| self.send(place, PACKETS));
        if let Some((name, link)) = attached {
            self.xdp(name)?.detach(link)?;
        }
        took.with_context(|| format!("{side:?}"))
    }
}

/// D6.
fn packets(place: &Place, bench: &mut Bench, rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut all: [Vec<Turns>; SIDES.len()] = Default::default();
    let mut net: [Vec<Turns>; SIDES.len()] = Default::default();
    for _ in 0..rounds {
        let mut turns: [Vec<f64>; SIDES.len()] = Default::default();
        for side in there_and_back(SIDES.len()) {
            turns[side].push(bench.turn(place, SIDES[side])?);
        }
        let sender = f64::midpoint(turns[0][0], turns[0][1]);
        for (side, taken) in turns.iter().enumerate() {
            let rate = |nanos: f64| 1e6 / nanos;
            all[side].push(Turns(rate(taken[0]), rate(taken[1])));
            net[side].push(Turns(rate(taken[0] - sender), rate(taken[1] - sender)));
        }
    }
    let [_, raw, xdp, tc, iptables] = [0, 1, 2, 3, 4];
    let row = |name: &str, sides: &[Vec<Turns>], ours: usize, (peer, floor): (&str, usize), target| {
        Row::compared(name, peer, "k/s", &compare(&sides[ours], &sides[floor]), target)
    };
    let (node, whole) = ("D6 NodePort packets per core", "D6 likewise, with the sender's part");
    let without = "D6 NodePort packets per core, tc alone";
    Ok(vec![
        row(node, &net, xdp, ("raw XDP redirect", raw), Target::AtLeast(0.7)),
        row(node, &net, xdp, ("iptables", iptables), Target::AtLeast(8.0)),
        row(node, &net, xdp, ("weft's tc", tc), Target::None),
        row(without, &net, tc, ("iptables", iptables), Target::None),
        row(whole, &all, xdp, ("raw XDP redirect", raw), Target::None),
        row(whole, &all, xdp, ("iptables", iptables), Target::None),
    ])
}
