//! Metrics of the service proxy, with kube-proxy's names where it has them.

mod drops;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use self::drops::Drops;
use crate::maps::Table;
use crate::plan::Totals;
use crate::policy::rules::Trial;
use crate::programs::DropCounters;

type Label = (&'static str, &'static str);
type Seconds = Gauge<f64, AtomicU64>;

/// What one synchronisation was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Synced {
    /// How long it took.
    pub(crate) took: Duration,
    /// Everything was compared, not only what changed.
    pub(crate) full: bool,
    /// Operations that failed.
    pub(crate) failed: usize,
    /// Services that are not in the maps as they should be.
    pub(crate) unprogrammed: usize,
    pub(crate) totals: Totals,
}

/// The metrics; a clone shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    sync: Histogram,
    sync_full: Histogram,
    sync_partial: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    programming: Histogram,
    service_changes: Counter,
    service_pending: Gauge,
    endpoint_changes: Counter,
    endpoint_pending: Gauge,
    no_local: Family<[Label; 1], Gauge>,
    healthz: Family<[Label; 1], Counter>,
    livez: Family<[Label; 1], Counter>,
    failures: Counter,
    services: Gauge,
    policies: Family<[Label; 1], Gauge>,
    would_drop: Family<Vec<(&'static str, String)>, Counter>,
    unprogrammed: Gauge,
    left_out: Family<[Label; 1], Gauge>,
    ejections: Counter,
    peers: Family<[Label; 1], Gauge>,
    narrow_ways: Gauge,
    checksums_by_node: Gauge,
    entries: Family<[Label; 1], Gauge>,
    capacity: Family<[Label; 1], Gauge>,
    held: Held,
    drops: Arc<Drops>,
    updated: Arc<Mutex<Option<Timestamp>>>,
}

/// Members of families that every synchronisation sets: to look them up by their labels each time would be a good part of it.
#[derive(Clone, Debug)]
struct Held {
    node_silent: Gauge,
    ejected: Gauge,
    no_local_internal: Gauge,
    no_local_external: Gauge,
    /// As [`Table::ALL`].
    entries: [Gauge; Table::ALL.len()],
}

impl Held {
    fn of(
        left_out: &Family<[Label; 1], Gauge>,
        no_local: &Family<[Label; 1], Gauge>,
        entries: &Family<[Label; 1], Gauge>,
    ) -> Self {
        let member = |family: &Family<[Label; 1], Gauge>, label| family.get_or_create(&[label]).clone();
        Self {
            node_silent: member(left_out, ("cause", "node_silent")),
            ejected: member(left_out, ("cause", "ejected")),
            no_local_internal: member(no_local, ("traffic_policy", "internal")),
            no_local_external: member(no_local, ("traffic_policy", "external")),
            entries: Table::ALL.map(|table| member(entries, ("map", table.label()))),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let sync = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        // kube-proxy's buckets, of which the scalability SLO of network programming is made.
        let whole = |range: std::ops::Range<u32>, step: usize| range.step_by(step).map(f64::from);
        let programming = [0.25, 0.5]
            .into_iter()
            .chain(whole(1..60, 1))
            .chain(whole(60..120, 5))
            .chain(whole(120..301, 30));
        let (left_out, no_local, entries) = (Family::default(), Family::default(), Family::default());
        Self {
            held: Held::of(&left_out, &no_local, &entries),
            left_out,
            no_local,
            entries,
            sync: sync(),
            sync_full: sync(),
            sync_partial: sync(),
            last_sync: Gauge::default(),
            last_queued: Gauge::default(),
            programming: Histogram::new(programming),
            service_changes: Counter::default(),
            service_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            endpoint_pending: Gauge::default(),
            healthz: Family::default(),
            livez: Family::default(),
            failures: Counter::default(),
            services: Gauge::default(),
            policies: Family::default(),
            would_drop: Family::default(),
            unprogrammed: Gauge::default(),
            ejections: Counter::default(),
            peers: Family::default(),
            narrow_ways: Gauge::default(),
            checksums_by_node: Gauge::default(),
            capacity: Family::default(),
            drops: Arc::default(),
            updated: Arc::default(),
        }
    }
}

impl Metrics {
    /// Registers them. What the name of a counter lacks, `_total`, the encoding adds.
    pub fn register(&self, registry: &mut Registry) {
        self.register_proxy(registry);
        let r = registry;
        let failures = "Map operations that failed and were retried";
        r.register("weft_dataplane_map_failures", failures, self.failures.clone());
        r.register("weft_dataplane_services", "Services in the maps", self.services.clone());
        let unprogrammed = "Services that are not in the maps as they should be, and are retried";
        r.register("weft_dataplane_services_unprogrammed", unprogrammed, self.unprogrammed.clone());
        let left_out = "Endpoints that would take traffic and are left out";
        r.register("weft_dataplane_endpoints_left_out", left_out, self.left_out.clone());
        let ejections = "Backends left out because connections to them failed";
        r.register("weft_dataplane_ejections", ejections, self.ejections.clone());
        let peers = "Other nodes, by whether they answer this one";
        r.register("weft_dataplane_nodes", peers, self.peers.clone());
        let narrow = "Ways to other nodes on which packets are lost that the first link takes";
        r.register("weft_dataplane_narrow_paths", narrow, self.narrow_ways.clone());
        let by_node = "Whether checksums within tunnels are not left to the network card, as a broken one's";
        r.register("weft_dataplane_checksum_offload_off", by_node, self.checksums_by_node.clone());
        r.register("weft_policy_objects", "Size of NetworkPolicy on this node", self.policies.clone());
        let would_drop = "Packets that policies on trial would drop";
        r.register("weft_policy_would_drop_packets", would_drop, self.would_drop.clone());
        r.register("weft_map_entries", "Entries of a map", self.entries.clone());
        r.register("weft_map_capacity", "Entries that fit in a map", self.capacity.clone());
        r.register_collector(Box::new(Arc::clone(&self.drops)));
        for table in Table::ALL {
            self.capacity.get_or_create(&[("map", table.label())]).set(table.capacity().into());
        }
    }

    fn register_proxy(&self, r: &mut Registry) {
        let mut add = |name: &str, help: &str, metric: &Histogram| {
            r.register(format!("kubeproxy_{name}_seconds"), help, metric.clone());
        };
        add("sync_proxy_rules_duration", "Time of one synchronisation", &self.sync);
        add("sync_full_proxy_rules_duration", "Time of one synchronisation of everything", &self.sync_full);
        add(
            "sync_partial_proxy_rules_duration",
            "Time of one synchronisation of changes",
            &self.sync_partial,
        );
        add("network_programming_duration", "Time from an endpoint's change to the maps", &self.programming);
        let mut add = |name: &str, help: &str, metric: &Seconds| {
            r.register(format!("kubeproxy_sync_proxy_rules_{name}_timestamp_seconds"), help, metric.clone());
        };
        add("last", "Time of the last synchronisation that succeeded", &self.last_sync);
        add("last_queued", "Time when the last synchronisation was asked for", &self.last_queued);
        let mut add = |name: &str, what: &str, changes: &Counter, pending: &Gauge| {
            let prefix = format!("kubeproxy_sync_proxy_rules_{name}_changes");
            r.register(prefix.clone(), format!("Changes of {what} seen"), changes.clone());
            let help = format!("Changes of {what} that are not in the maps yet");
            r.register(format!("{prefix}_pending"), help, pending.clone());
        };
        add("service", "Services", &self.service_changes, &self.service_pending);
        add("endpoint", "endpoints", &self.endpoint_changes, &self.endpoint_pending);
        let no_local = "Services of a Local traffic policy that have endpoints, and none on this node";
        r.register("kubeproxy_sync_proxy_rules_no_local_endpoints_total", no_local, self.no_local.clone());
        r.register("kubeproxy_proxy_healthz", "Answers of /healthz by status code", self.healthz.clone());
        r.register("kubeproxy_proxy_livez", "Answers of /livez by status code", self.livez.clone());
    }

    pub(crate) fn synced(&self, done: &Synced) {
        let seconds = done.took.as_secs_f64();
        self.sync.observe(seconds);
        if done.full { &self.sync_full } else { &self.sync_partial }.observe(seconds);
        self.failures.inc_by(done.failed as u64);
        self.services.set(number(done.totals.services));
        self.unprogrammed.set(number(done.unprogrammed));
        let Held { node_silent, ejected, no_local_internal, no_local_external, .. } = &self.held;
        node_silent.set(number(done.totals.left_out));
        ejected.set(number(done.totals.ejected));
        no_local_internal.set(number(done.totals.no_local_internal));
        no_local_external.set(number(done.totals.no_local_external));
        if done.failed == 0 {
            let now = Timestamp::now();
            *self.updated.lock() = Some(now);
            self.last_sync.set(now.as_duration().as_secs_f64());
            self.service_pending.set(0);
            self.endpoint_pending.set(0);
        }
    }

    /// Changes of Services came.
    pub(crate) fn services_changed(&self, count: usize) {
        self.changed(&self.service_changes, &self.service_pending, count);
    }

    /// Changes of endpoints came.
    pub(crate) fn endpoints_changed(&self, count: usize) {
        self.changed(&self.endpoint_changes, &self.endpoint_pending, count);
    }

    fn changed(&self, changes: &Counter, pending: &Gauge, count: usize) {
        changes.inc_by(count as u64);
        pending.inc_by(number(count));
        self.last_queued.set(Timestamp::now().as_duration().as_secs_f64());
    }

    pub(crate) fn programmed(&self, seconds: f64) {
        self.programming.observe(seconds.max(0.0));
    }

    /// How big NetworkPolicy is on this node.
    pub(crate) fn policies(&self, counts: &crate::policy::planner::Counts) {
        let all = [
            ("policies", counts.policies),
            ("isolated_pods", counts.isolated),
            ("identities", counts.identities),
            ("rules", counts.rules),
        ];
        for (of, count) in all {
            self.policies.get_or_create(&[("of", of)]).set(number(count));
        }
    }

    /// What the policies on trial would have dropped, by their sets.
    pub(crate) fn would_drop(&self, trials: &BTreeMap<u64, Trial>, counts: &BTreeMap<u64, u64>) {
        self.would_drop.clear();
        for (set, trial) in trials {
            let names: Vec<String> = trial.policies.iter().map(|name| format!("{name:?}")).collect();
            let direction = if trial.ingress { "ingress" } else { "egress" };
            let labels = vec![("policy", names.join(",")), ("direction", direction.to_owned())];
            // Pods of different labels may have sets of the same policies.
            self.would_drop.get_or_create(&labels).inc_by(counts.get(set).copied().unwrap_or(0));
        }
    }

    /// A backend was ejected.
    pub(crate) fn ejected(&self) {
        self.ejections.inc();
    }

    /// How many of the other nodes answer this one.
    pub(crate) fn peers(&self, counts: crate::peers::Counts) {
        let all =
            [("answering", counts.answering), ("silent", counts.silent), ("never_heard", counts.unheard)];
        for (state, count) in all {
            self.peers.get_or_create(&[("state", state)]).set(number(count));
        }
    }

    /// How many ways to other nodes are narrower than they begin.
    pub(crate) fn narrow_ways(&self, count: usize) {
        self.narrow_ways.set(number(count));
    }

    /// Whether checksums within tunnels are left to the card.
    pub(crate) fn leaves_checksums(&self, leaves: bool) {
        self.checksums_by_node.set(i64::from(!leaves));
    }

    pub(crate) fn holds(&self, table: Table, entries: usize) {
        self.held.entries[table as usize].set(number(entries));
    }

    /// Lets the drops be read whenever somebody asks for the metrics.
    pub(crate) fn count_drops(&self, counters: DropCounters) {
        self.drops.set(counters);
    }

    pub(crate) fn health_asked(&self, path: &'static str, good: bool) {
        let answers = if path == "livez" { &self.livez } else { &self.healthz };
        answers.get_or_create(&[("code", if good { "200" } else { "503" })]).inc();
    }

    /// When the maps were last what they should be: now, as long as nothing is late.
    pub(crate) fn last_updated(&self, healthy: bool) -> Option<String> {
        let last = *self.updated.lock();
        let at = if healthy { Some(Timestamp::now()) } else { last };
        at.map(|at| at.to_string())
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
