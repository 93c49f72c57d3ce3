//! Metrics of the service proxy, with kube-proxy's names where it has them.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// The metrics; a clone shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    sync: Histogram,
    last_sync: Gauge<f64, AtomicU64>,
    programming: Histogram,
    failures: Counter,
    services: Gauge,
    policies: Family<Vec<(&'static str, &'static str)>, Gauge>,
    drops: Family<Vec<(&'static str, &'static str)>, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            sync: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            last_sync: Gauge::default(),
            programming: Histogram::new(exponential_buckets(0.001, 2.0, 20)),
            failures: Counter::default(),
            services: Gauge::default(),
            policies: Family::default(),
            drops: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Time of one synchronisation",
            self.sync.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "Time of the last synchronisation",
            self.last_sync.clone(),
        );
        registry.register(
            "kubeproxy_network_programming_duration_seconds",
            "Time from an endpoint's change to the maps",
            self.programming.clone(),
        );
        registry.register(
            "weft_dataplane_map_failures",
            "Map operations that failed and were retried",
            self.failures.clone(),
        );
        registry.register("weft_policy_objects", "Size of NetworkPolicy on this node", self.policies.clone());
        registry.register("weft_dataplane_services", "Services in the maps", self.services.clone());
        registry.register(
            "weft_dataplane_drops",
            "Traffic refused since the maps were made, by reason",
            self.drops.clone(),
        );
    }

    pub(crate) fn synced(&self, took: Duration, at_seconds: f64, failed: usize, services: usize) {
        self.sync.observe(took.as_secs_f64());
        self.last_sync.set(at_seconds);
        self.failures.inc_by(failed as u64);
        self.services.set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    pub(crate) fn programmed(&self, seconds: f64) {
        self.programming.observe(seconds.max(0.0));
    }

    pub(crate) fn policies(&self, policies: usize, isolated: usize, identities: usize, rules: usize) {
        let all = [
            ("policies", policies),
            ("isolated_pods", isolated),
            ("identities", identities),
            ("rules", rules),
        ];
        for (of, count) in all {
            self.policies.get_or_create(&vec![("of", of)]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    pub(crate) fn dropped(&self, reason: &'static str, count: u64) {
        let drops = self.drops.get_or_create(&vec![("reason", reason)]);
        drops.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
