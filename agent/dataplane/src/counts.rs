//! What the programs count of each Service, with its name: connections, those that failed, and what was turned away, by reason.
//!
//! The programs know lists of backends by number; whose they are only the dataplane's own task knows, which is asked whenever
//! somebody asks for the metrics. So counting costs nothing where nobody asks, and no name is kept for it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use aya::maps::Map;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use tokio::sync::{mpsc, oneshot};
use weft_ebpf_abi::{CONNECTIONS, CountKey, DropReason, FAILED, names, sizes};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::programs::{ProgramError, Programs, check_layout, duplicate, mismatch};
use crate::sys;
use crate::tables::ServiceName;

/// Questions that wait for the dataplane: more askers wait for a place.
const MAX_QUESTIONS: usize = 4;

/// Asks whose some lists are.
#[derive(Debug)]
pub(crate) struct WhoseLists {
    lists: BTreeSet<u32>,
    reply: oneshot::Sender<HashMap<u32, ServiceName>>,
}

impl WhoseLists {
    /// Answers; a list without an owner is no Service's any more.
    pub(crate) fn answer<'s>(self, owner: impl Fn(u32) -> Option<&'s ServiceName>) {
        let named = self.lists.iter().filter_map(|list| Some((*list, owner(*list)?.clone())));
        // Who asked may have gone away meanwhile.
        let _ = self.reply.send(named.collect());
    }
}

/// The programs' counters, by list.
#[derive(Debug)]
pub struct Counters {
    map: OwnedFd,
    /// For how many processors the kernel gives a value.
    processors: usize,
}

impl Counters {
    /// Those of these programs.
    ///
    /// # Errors
    /// If the programs are others.
    pub fn of(programs: &Programs) -> Result<Self, ProgramError> {
        let Some(Map::PerCpuHashMap(data)) = programs.ebpf.map(names::COUNTS) else {
            return Err(mismatch(names::COUNTS));
        };
        check_layout(data, names::COUNTS, size_of::<CountKey>(), size_of::<u64>())?;
        let processors = aya::util::nr_cpus()
            .map_err(|(path, source)| crate::node::failed("read", path.as_ref())(source))?;
        Ok(Self { map: duplicate(data, names::COUNTS)?, processors })
    }

    /// All that was counted.
    ///
    /// # Errors
    /// If the map can't be read.
    pub fn read(&self) -> std::io::Result<BTreeMap<CountKey, u64>> {
        let (key_bytes, value_bytes) = (size_of::<CountKey>(), self.processors * size_of::<u64>());
        let (keys, values) = sys::read_all(self.map.as_fd(), key_bytes, value_bytes)?;
        let sum = |values: &[u8]| {
            let each = values.chunks_exact(size_of::<u64>());
            each.filter_map(|value| u64::read_from_bytes(value).ok()).fold(0, u64::wrapping_add)
        };
        let pairs = keys.chunks_exact(key_bytes).zip(values.chunks_exact(value_bytes));
        Ok(pairs
            .filter_map(|(key, values)| Some((CountKey::read_from_bytes(key).ok()?, sum(values))))
            .collect())
    }

    /// Removes what was counted of lists that are no Service's any more. What fails is tried again the next time.
    fn forget(&self, keys: &[CountKey]) {
        let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        if let (_, Err(error)) = sys::delete_batch(self.map.as_fd(), keys.as_bytes(), count) {
            tracing::debug!(%error, "counts of Services that are gone are still there");
        }
    }
}

/// Reads what was counted, for who asks for the metrics.
#[derive(Clone)]
pub(crate) struct Counted {
    counters: Arc<Counters>,
    ask: mpsc::Sender<WhoseLists>,
}

impl Counted {
    /// Reads the counters of these programs; questions come by the other half.
    pub(crate) fn of(programs: &Programs) -> Result<(Self, mpsc::Receiver<WhoseLists>), ProgramError> {
        let (ask, asked) = mpsc::channel(MAX_QUESTIONS);
        Ok((Self { counters: Arc::new(Counters::of(programs)?), ask }, asked))
    }

    /// What was counted since the programs were loaded; nothing if the dataplane is about to end.
    pub(crate) async fn read(&self) -> std::io::Result<Services> {
        let counters = Arc::clone(&self.counters);
        let counts = tokio::task::spawn_blocking(move || counters.read()).await??;
        let (reply, names) = oneshot::channel();
        let lists = counts.keys().map(|key| key.list).collect();
        if self.ask.send(WhoseLists { lists, reply }).await.is_err() {
            return Ok(Services::default());
        }
        let Ok(names) = names.await else { return Ok(Services::default()) };
        let gone: Vec<_> = counts.keys().filter(|key| !names.contains_key(&key.list)).copied().collect();
        if !gone.is_empty() {
            self.counters.forget(&gone);
        }
        if counts.len() - gone.len() >= sizes::COUNTS as usize {
            tracing::warn!(
                entries = counts.len(),
                "the map of Services' counts is full: what other Services do is not counted"
            );
        }
        Ok(Services::sum(&counts, &names))
    }
}

/// What was counted, by Service.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Services {
    connections: BTreeMap<ServiceName, u64>,
    failures: BTreeMap<ServiceName, u64>,
    drops: BTreeMap<(ServiceName, &'static str), u64>,
}

impl Services {
    /// A Service may have several lists: for each of its ports, and for clients inside and outside.
    fn sum(counts: &BTreeMap<CountKey, u64>, names: &HashMap<u32, ServiceName>) -> Self {
        let mut services = Self::default();
        for (CountKey { list, what }, count) in counts {
            let Some(name) = names.get(list).cloned() else { continue };
            let total = match *what {
                CONNECTIONS => services.connections.entry(name).or_default(),
                FAILED => services.failures.entry(name).or_default(),
                number => {
                    let reason = DropReason::ALL.into_iter().find(|reason| *reason as u32 == number);
                    services.drops.entry((name, reason.map_or("unknown", DropReason::name))).or_default()
                }
            };
            *total += count;
        }
        services
    }
}

impl Collector for Services {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut add = |name: &str, help: &str, counts: &BTreeMap<ServiceName, u64>| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (service, count) in counts {
                let labels = [("namespace", service.namespace()), ("service", service.name())];
                ConstCounter::new(*count).encode(metric.encode_family(&labels)?)?;
            }
            Ok(())
        };
        let help = "Connections and flows that got an endpoint of the Service, since the agent started";
        add("weft_service_connections", help, &self.connections)?;
        let help = "Those of Services with ejection whose connection failed";
        add("weft_service_failures", help, &self.failures)?;
        let help = "What the Service turned away, by reason";
        let mut metric = encoder.encode_descriptor("weft_service_drops", help, None, MetricType::Counter)?;
        for ((service, reason), count) in &self.drops {
            let labels =
                [("namespace", service.namespace()), ("service", service.name()), ("reason", *reason)];
            ConstCounter::new(*count).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_of_a_service_are_summed_up_and_lists_of_nobody_left_out() {
        let web = ServiceName::new("shop", "web");
        let names = HashMap::from([(1, web.clone()), (2, web.clone()), (3, ServiceName::new("shop", "db"))]);
        let key = |list, what| CountKey { list, what };
        let counts = BTreeMap::from([
            (key(1, CONNECTIONS), 5),
            (key(2, CONNECTIONS), 7),
            (key(2, FAILED), 1),
            (key(1, DropReason::SocketNoEndpoints as u32), 2),
            (key(2, DropReason::SocketNoEndpoints as u32), 2),
            (key(4, CONNECTIONS), 9),
        ]);
        let services = Services::sum(&counts, &names);
        assert_eq!(services.connections, BTreeMap::from([(web.clone(), 12)]));
        assert_eq!(services.failures, BTreeMap::from([(web.clone(), 1)]));
        assert_eq!(services.drops, BTreeMap::from([((web, "socket_no_endpoints"), 4)]));
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(services));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "weft_service_connections_total{namespace=\"shop\",service=\"web\"} 12",
            "weft_service_failures_total{namespace=\"shop\",service=\"web\"} 1",
            "weft_service_drops_total{namespace=\"shop\",service=\"web\",reason=\"socket_no_endpoints\"} 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
