//! DEL and GC: what belongs to an owner goes, the lease last; what is gone already is no error.

use std::collections::HashSet;
use std::net::IpAddr;

use weft_cni_ipam::Owner;
use weft_cni_netlink::{Class, Neighbour, Netlink};
use weft_cni_spec::{Config, Fabric};

use crate::error::PluginError;
use crate::{capabilities, leases, names};

pub(crate) fn del(config: &Config, owner: &Owner) -> Result<(), PluginError> {
    let leases = leases(config)?;
    capabilities::unmap_ports(&leases, owner)?;
    // In chained use the interface is another's, and the bounds on traffic go with it.
    let Some(fabric) = &config.fabric else { return Ok(()) };
    let held = leases.held(owner)?;
    unlink(config, fabric, owner, &held)?;
    Ok(leases.release(owner)?)
}

/// Removes every attachment that isn't among the valid ones.
pub(crate) fn gc(config: &Config) -> Result<(), PluginError> {
    let valid: HashSet<(&str, &str)> =
        config.valid_attachments.iter().map(|one| (one.container.as_str(), one.ifname.as_str())).collect();
    let leases = leases(config)?;
    // An owner has a lease of each family.
    let mut stale: HashSet<Owner> = leases.all()?.into_iter().map(|lease| lease.owner).collect();
    stale.extend(leases.mapped()?.into_iter().map(|mapped| mapped.owner));
    stale.retain(|owner| !valid.contains(&(owner.container.as_str(), owner.ifname.as_str())));
    // Every one is tried; the first failure is what is said (CNI 1.1.0 §4 GC).
    let outcomes: Vec<_> = stale.iter().map(|owner| del(config, owner)).collect();
    outcomes.into_iter().collect()
}

/// Removes an owner's pair, and the neighbours that the host has for its addresses.
pub(crate) fn unlink(
    config: &Config,
    fabric: &Fabric,
    owner: &Owner,
    addresses: &[IpAddr],
) -> Result<(), PluginError> {
    let mut host = Netlink::open()?;
    host.delete_link_early(&names::host_interface(&config.name, owner))?;
    match host.link(&fabric.bridge) {
        Ok(bridge) => {
            for address in addresses {
                let (index, mac) = (bridge.index, names::mac([*address]));
                host.delete_neighbour(&Neighbour { index, address: *address, mac })?;
            }
            Ok(())
        }
        // The neighbours went with it.
        Err(error) if error.class() == Class::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}
