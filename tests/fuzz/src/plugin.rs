//! What runtimes hand to the CNI plugin: configuration, previous result, environment.

use std::collections::HashMap;

use serde_json::Value;
use weft_cni_spec::{Call, Config};

/// A configuration on standard input.
pub(crate) fn config(bytes: &[u8]) {
    let version = Config::version(bytes);
    let Ok(config) = Config::read(bytes) else { return };
    assert_eq!(Some(config.version), version.ok());
    assert!(config.state_dir.is_absolute());
    assert!(
        !config.name.contains('/') && !config.name.starts_with('.'),
        "{:?} is part of a path",
        config.name
    );
    if let Some(fabric) = &config.fabric {
        for range in &fabric.ipam.ranges {
            assert!(range.subnet.contains(range.gateway), "{range:?}");
        }
    }
    if let Some(previous) = &config.prev_result {
        assert!(previous.is_object(), "an answer is made from it");
        let addresses = weft_cni_plugin::fuzz::addresses(previous);
        let listed = previous.get("ips").and_then(Value::as_array).map_or(0, Vec::len);
        assert!(addresses.len() <= listed);
    }
}

/// Lines `NAME=value`: the environment of a call. VERSION is answered whatever standard input holds.
pub(crate) fn call(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let variables: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let look_up = |name: &'static str| variables.get(name).map(|value| (*value).to_owned());
    if let Ok(call) = Call::read(look_up) {
        assert!(call.ifname.len() <= 15 && !call.ifname.contains('/'));
        assert!(!call.container.contains('/') && !call.container.starts_with('.'));
    }
    let version = |name: &'static str| (name == "CNI_COMMAND").then(|| "VERSION".to_owned());
    let answer = weft_cni_plugin::run(version, bytes).expect("VERSION is always answered");
    assert!(
        serde_json::from_str::<Value>(&answer).is_ok_and(|answer| answer["supportedVersions"].is_array())
    );
}
