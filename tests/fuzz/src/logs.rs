//! Lines of container logs.

use weft_agent_kubelet::fuzz::log_line;

pub(crate) fn line(bytes: &[u8]) {
    let Some((text, partial)) = log_line(bytes) else { return };
    // What is read of it is written as another line of the same kind.
    let tag = if partial { "P" } else { "F" };
    let written = [format!("2026-01-01T00:00:00.000000001Z stdout {tag} ").as_bytes(), text].concat();
    assert_eq!(log_line(&written), Some((text, partial)));
}
