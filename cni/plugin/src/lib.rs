//! The CNI plugin: a veth pair from the pod into the node's bridge, an address, a default route.
//!
//! One short-lived process of one thread per call. The order of steps is what makes a kill at any moment harmless: the lease is
//! taken first and given back last, so whatever exists in the kernel has a lease, and DEL and GC find it by the lease.
#![forbid(unsafe_code)]

mod attach;
mod capabilities;
mod chained;
mod check;
mod detach;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod names;

use weft_cni_ipam::{Leases, Owner, Pool};
use weft_cni_netlink::Netlink;
use weft_cni_spec::{Call, Command, Config, ErrorReport, Fabric, Version, VersionResult};

use error::PluginError;

/// Carries out a call. The answer, or the report of the failure, is what goes to standard output.
///
/// # Errors
/// The report, as JSON.
pub fn run(variable: impl Fn(&'static str) -> Option<String>, input: &[u8]) -> Result<String, String> {
    let answer = Call::read(variable).map_err(PluginError::from).and_then(|call| dispatch(&call, input));
    answer.map_err(|error| report(Config::version(input).ok(), &error))
}

/// The report of a configuration that could not be read.
pub fn unreadable(source: std::io::Error) -> String {
    report(None, &PluginError::Input { source })
}

fn report(version: Option<Version>, error: &PluginError) -> String {
    let report = ErrorReport::new(version, error.code(), error);
    serde_json::to_string(&report).unwrap_or_else(|_| format!("{{\"code\":{}}}", report.code))
}

fn dispatch(call: &Call, input: &[u8]) -> Result<String, PluginError> {
    if call.command == Command::Version {
        return Ok(json(&VersionResult::new(asked_version(input))));
    }
    let config = Config::read(input)?;
    check_spoken(call.command, config.version)?;
    let owner = Owner { container: call.container.clone(), ifname: call.ifname.clone() };
    let done = |()| String::new();
    match (call.command, &config.fabric) {
        (Command::Add, Some(fabric)) => {
            attach::add(call, &config, fabric, &owner).map(|result| json(&result.to_json(config.version)))
        }
        (Command::Add, None) => chained::add(call, &config, &owner).map(|result| json(&result)),
        (Command::Del, _) => detach::del(&config, &owner).map(done),
        (Command::Check, Some(fabric)) => check::check(call, &config, fabric, &owner).map(done),
        (Command::Check, None) => chained::check(call, &config).map(done),
        (Command::Gc, _) => detach::gc(&config).map(done),
        (Command::Status, _) => status(&config).map(done),
        (Command::Version, _) => Ok(String::new()),
    }
}

fn json(value: &impl serde::Serialize) -> String {
    // These are maps with string keys and numbers: nothing in them can fail to be written.
    serde_json::to_string(value).unwrap_or_default()
}

/// The version of a VERSION call, which may be one that isn't spoken.
fn asked_version(input: &[u8]) -> String {
    let input: Option<serde_json::Value> = serde_json::from_slice(input).ok();
    let asked = input.as_ref().and_then(|input| input.get("cniVersion")).and_then(|version| version.as_str());
    asked.unwrap_or(Version::V1_1_0.as_str()).to_owned()
}

/// CHECK came with 0.4.0, GC and STATUS with 1.1.0.
fn check_spoken(command: Command, version: Version) -> Result<(), PluginError> {
    let (name, since) = match command {
        Command::Check => ("CHECK", Version::V0_4_0),
        Command::Gc => ("GC", Version::V1_1_0),
        Command::Status => ("STATUS", Version::V1_1_0),
        Command::Add | Command::Del | Command::Version => return Ok(()),
    };
    if version < since {
        return Err(PluginError::NotInVersion { command: name, version });
    }
    Ok(())
}

/// A pool for each range, in their order.
fn pools(fabric: &Fabric) -> Vec<Pool> {
    fabric.ipam.ranges.iter().map(|range| Pool::new(range.subnet, range.gateway)).collect()
}

fn leases(config: &Config) -> Result<Leases, PluginError> {
    Ok(Leases::open(&config.state_dir.join(&config.name))?)
}

/// Whether the next ADD can be served.
fn status(config: &Config) -> Result<(), PluginError> {
    let unavailable = |source: PluginError| PluginError::Unavailable { source: Box::new(source) };
    let taken = leases(config).and_then(|leases| {
        // As ADD would.
        drop(leases.lock()?);
        Ok(leases.all()?)
    });
    let taken = taken.map_err(unavailable)?;
    for pool in config.fabric.iter().flat_map(pools) {
        let held = taken.iter().filter(|lease| pool.holds(lease.address)).count();
        if held as u128 >= pool.size() {
            return Err(unavailable(weft_cni_ipam::Error::Exhausted.into()));
        }
    }
    Netlink::open().map_err(|error| unavailable(error.into()))?;
    Ok(())
}
