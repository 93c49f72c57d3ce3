//! The kubelet's metrics, under upstream's names.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

type Labels = Vec<(String, String)>;

/// All metrics.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) running_pods: Gauge,
    pub(crate) running_containers: Gauge,
    pub(crate) started_pods: Counter,
    pub(crate) started_containers: Counter,
    /// From the first sight of a pod to its containers running, seconds.
    pub(crate) pod_start_seconds: Histogram,
    probes: Family<Labels, Counter>,
}

impl Metrics {
    pub(crate) fn new(node: &str) -> Self {
        let buckets = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];
        let metrics = Self {
            registry: Registry::default(),
            running_pods: Gauge::default(),
            running_containers: Gauge::default(),
            started_pods: Counter::default(),
            started_containers: Counter::default(),
            pod_start_seconds: Histogram::new(buckets),
            probes: Family::default(),
        };
        metrics.registered(node)
    }

    fn registered(mut self, node: &str) -> Self {
        let names: Family<Labels, Gauge> = Family::default();
        names.get_or_create(&vec![("node".into(), node.into())]).set(1);
        let r = &mut self.registry;
        r.register("kubelet_node_name", "The node's name. The count is always 1", names);
        r.register("kubelet_running_pods", "Pods in phase Running", self.running_pods.clone());
        r.register("kubelet_running_containers", "Containers running", self.running_containers.clone());
        r.register("kubelet_started_pods", "Sandboxes started", self.started_pods.clone());
        r.register("kubelet_started_containers", "Containers started", self.started_containers.clone());
        r.register(
            "kubelet_pod_start_duration_seconds",
            "Seconds from seeing a pod for the first time to its containers running",
            self.pod_start_seconds.clone(),
        );
        r.register("prober_probe", "Probe results by type and result", self.probes.clone());
        self
    }

    /// Counts a probe's result.
    pub(crate) fn probe(&self, kind: &str, good: bool) {
        let result = if good { "successful" } else { "failed" };
        self.probes
            .get_or_create(&vec![("probe_type".into(), kind.into()), ("result".into(), result.into())])
            .inc();
    }

    /// In the text format of Prometheus.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
