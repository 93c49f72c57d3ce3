//! Owns the scheduler's metrics, named as upstream's.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Attempt {
    profile: String,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueName {
    queue: &'static str,
}

/// The outcome of an attempt to schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Result {
    Scheduled,
    Unschedulable,
    Error,
}

/// The scheduler's metrics. Register them once; clones count into the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    attempts: Family<Attempt, Counter>,
    pending: Family<QueueName, Gauge>,
    durations: Family<Attempt, Histogram, fn() -> Histogram>,
}

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            attempts: Family::default(),
            pending: Family::default(),
            durations: Family::new_with_constructor(seconds as fn() -> Histogram),
        }
    }
}

impl Metrics {
    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "scheduler_schedule_attempts",
            "Number of attempts to schedule pods, by the result",
            self.attempts.clone(),
        );
        registry.register(
            "scheduler_pending_pods",
            "Number of pending pods, by the queue",
            self.pending.clone(),
        );
        registry.register(
            "scheduler_scheduling_attempt_duration_seconds",
            "Scheduling attempt latency in seconds (decision and binding)",
            self.durations.clone(),
        );
    }

    pub(crate) fn attempt(&self, profile: &str, result: Result, seconds: f64) {
        let result = match result {
            Result::Scheduled => "scheduled",
            Result::Unschedulable => "unschedulable",
            Result::Error => "error",
        };
        let labels = Attempt { profile: profile.to_owned(), result };
        self.attempts.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(seconds);
    }

    pub(crate) fn pending(&self, counts: [i64; 3]) {
        for (queue, count) in ["active", "backoff", "unschedulable"].into_iter().zip(counts) {
            self.pending.get_or_create(&QueueName { queue }).set(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams() {
        let (metrics, mut registry, mut text) = (Metrics::default(), Registry::default(), String::new());
        metrics.register(&mut registry);
        metrics.attempt("default-scheduler", Result::Scheduled, 0.002);
        metrics.pending([1, 0, 2]);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let wanted = r#"scheduler_schedule_attempts_total{profile="default-scheduler",result="scheduled"} 1"#;
        assert!(text.contains(wanted), "{text}");
        assert!(text.contains(r#"scheduler_pending_pods{queue="unschedulable"} 2"#), "{text}");
    }
}
