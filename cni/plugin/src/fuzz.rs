//! What the fuzzer feeds: what the plugin before this one answered.

use std::net::IpAddr;

use serde_json::Value;

/// The container's addresses of a `prevResult`.
pub fn addresses(previous: &Value) -> Vec<IpAddr> {
    crate::chained::addresses(previous)
}
