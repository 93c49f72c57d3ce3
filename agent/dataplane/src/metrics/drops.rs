//! Drops by reason, read from the programs' counters when somebody asks.

use std::fmt;
use std::sync::OnceLock;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use crate::programs::DropCounters;

/// The counters, once the programs are loaded.
#[derive(Debug, Default)]
pub(super) struct Drops(OnceLock<DropCounters>);

impl Drops {
    pub(super) fn set(&self, counters: DropCounters) {
        // A second dataplane with the same metrics would read the same pinned map.
        let _ = self.0.set(counters);
    }
}

impl Collector for Drops {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(counters) = self.0.get() else { return Ok(()) };
        let counts = match counters.read() {
            Ok(counts) => counts,
            Err(error) => {
                tracing::warn!(%error, source = ?std::error::Error::source(&error), "drops are left out of the metrics");
                return Ok(());
            }
        };
        let help = "Traffic refused since the maps were made, by reason";
        let mut metric =
            encoder.encode_descriptor("weft_dataplane_drops", help, None, MetricType::Counter)?;
        for (reason, count) in counts {
            ConstCounter::new(count).encode(metric.encode_family(&[("reason", reason)])?)?;
        }
        Ok(())
    }
}
