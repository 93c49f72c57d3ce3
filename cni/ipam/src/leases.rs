//! Who holds which address: one symbolic link per lease, named by the address, pointing at `container/interface`.
//!
//! symlink(2) makes the lease and its content in one step, and fails if the address is taken: there is no moment at which
//! a kill leaves half a lease. What a killed ADD leaves is a whole lease of a known owner, which the next ADD of that owner
//! takes over, and DEL or GC gives back. Nothing is synced: leases don't outlive a boot, because no namespace does. They lie
//! in a folder named by the boot; folders of earlier boots are removed by the first ADD.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::Pool;

/// Names the boot that the kernel is in.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The address that was given last, as a link like the leases; only a hint.
const LAST: &str = "last";

/// A container's interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The container's id. Holds no `/`.
    pub container: String,
    /// The interface's name. Holds no `/`.
    pub ifname: String,
}

/// An address and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// Its holder.
    pub owner: Owner,
}

/// Why a lease could not be had, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every address is taken.
    #[error("no address is free in the pod subnet")]
    Exhausted,
    /// The address that was asked for is not one of the pool.
    #[error("the address {0} is not one for pods")]
    NotInPool(Ipv4Addr),
    /// The address that was asked for is taken.
    #[error("the address {0} is held by another container")]
    Taken(Ipv4Addr),
    /// The folder can't be used.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The leases of one network on this node, locked against other processes for as long as this lives.
#[derive(Debug)]
pub struct Leases {
    folder: PathBuf,
    _lock: Flock<File>,
}

impl Leases {
    /// Opens the leases of this boot below `state`, and forgets those of earlier boots.
    ///
    /// # Errors
    /// If the folder can't be made or read.
    pub fn open(state: &Path) -> Result<Self, Error> {
        let boot = fs::read_to_string(BOOT_ID).map_err(failed("read", Path::new(BOOT_ID)))?;
        Self::open_for(state, boot.trim())
    }

    fn open_for(state: &Path, boot: &str) -> Result<Self, Error> {
        fs::create_dir_all(state).map_err(failed("create", state))?;
        let path = state.join("lock");
        let file = File::options().create(true).append(true).open(&path).map_err(failed("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::Io { op: "lock", path: path.clone(), source: errno.into() })?;
        let folder = state.join(format!("boot-{boot}"));
        if !folder.is_dir() {
            forget_earlier_boots(state)?;
            fs::create_dir(&folder).map_err(failed("create", &folder))?;
        }
        Ok(Self { folder, _lock: lock })
    }

    /// All leases.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn all(&self) -> Result<Vec<Lease>, Error> {
        let mut leases = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed("read", &self.folder))? {
            let name = entry.map_err(failed("read", &self.folder))?.file_name();
            let Some(address) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Some(owner) = self.owner(&name)? {
                leases.push(Lease { address, owner });
            }
        }
        Ok(leases)
    }

    fn owner(&self, name: &OsStr) -> Result<Option<Owner>, Error> {
        let path = self.folder.join(name);
        let target = fs::read_link(&path).map_err(failed("read", &path))?;
        let owner = target.to_str().and_then(|target| target.split_once('/'));
        Ok(owner.map(|(container, ifname)| Owner { container: container.to_owned(), ifname: ifname.to_owned() }))
    }

    /// An address for an owner: `wanted` if given, the one it holds already, or the next that is free.
    ///
    /// # Errors
    /// If there is none, or the wanted one can't be had.
    pub fn acquire(&self, pool: &Pool, owner: &Owner, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr, Error> {
        let leases = self.all()?;
        let held = leases.iter().find(|lease| lease.owner == *owner).map(|lease| lease.address);
        if let Some(wanted) = wanted {
            if !pool.holds(wanted) {
                return Err(Error::NotInPool(wanted));
            }
            if held != Some(wanted) {
                if leases.iter().any(|lease| lease.address == wanted) {
                    return Err(Error::Taken(wanted));
                }
                self.write(wanted, owner)?;
            }
            return Ok(wanted);
        }
        // A pool that was changed may no longer have it.
        if let Some(held) = held.filter(|held| pool.holds(*held)) {
            return Ok(held);
        }
        let used: std::collections::HashSet<Ipv4Addr> = leases.iter().map(|lease| lease.address).collect();
        let next = pool.next(self.last(), |address| used.contains(&address)).ok_or(Error::Exhausted)?;
        self.write(next, owner)?;
        self.remember(next)?;
        Ok(next)
    }

    /// Gives back everything that an owner holds; nothing held is no error.
    ///
    /// # Errors
    /// If the folder can't be changed.
    pub fn release(&self, owner: &Owner) -> Result<(), Error> {
        for lease in self.all()?.iter().filter(|lease| lease.owner == *owner) {
            self.remove(lease.address)?;
        }
        Ok(())
    }

    fn write(&self, address: Ipv4Addr, owner: &Owner) -> Result<(), Error> {
        let path = self.folder.join(address.to_string());
        symlink(format!("{}/{}", owner.container, owner.ifname), &path).map_err(failed("create", &path))
    }

    fn remove(&self, address: Ipv4Addr) -> Result<(), Error> {
        remove(&self.folder.join(address.to_string()))
    }

    fn last(&self) -> Option<Ipv4Addr> {
        fs::read_link(self.folder.join(LAST)).ok()?.to_str()?.parse().ok()
    }

    fn remember(&self, address: Ipv4Addr) -> Result<(), Error> {
        let path = self.folder.join(LAST);
        remove(&path)?;
        symlink(address.to_string(), &path).map_err(failed("create", &path))
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn forget_earlier_boots(state: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(state).map_err(failed("read", state))? {
        let entry = entry.map_err(failed("read", state))?;
        if entry.file_name().to_string_lossy().starts_with("boot-") {
            fs::remove_dir_all(entry.path()).map_err(failed("remove", &entry.path()))?;
        }
    }
    Ok(())
}

fn failed(op: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { op, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        Pool::new("10.42.1.0/29".parse().unwrap(), Ipv4Addr::new(10, 42, 1, 1))
    }

    fn owner(name: &str) -> Owner {
        Owner { container: name.to_owned(), ifname: "eth0".to_owned() }
    }

    #[test]
    fn an_owner_keeps_its_address_until_it_gives_it_back() {
        let state = tempfile::tempdir().unwrap();
        let acquire = |name: &str| Leases::open(state.path()).unwrap().acquire(&pool(), &owner(name), None);
        let a = acquire("a").unwrap();
        assert_eq!(acquire("a").unwrap(), a);
        let others: Vec<Ipv4Addr> = ["b", "c", "d", "e"].map(|name| acquire(name).unwrap()).to_vec();
        assert!(!others.contains(&a));
        assert!(matches!(acquire("f"), Err(Error::Exhausted)));
        Leases::open(state.path()).unwrap().release(&owner("c")).unwrap();
        Leases::open(state.path()).unwrap().release(&owner("c")).unwrap();
        assert_eq!(acquire("f").unwrap(), others[1]);
    }

    #[test]
    fn a_wanted_address_is_given_or_refused() {
        let state = tempfile::tempdir().unwrap();
        let leases = Leases::open(state.path()).unwrap();
        let wanted = Ipv4Addr::new(10, 42, 1, 5);
        assert_eq!(leases.acquire(&pool(), &owner("a"), Some(wanted)).unwrap(), wanted);
        assert_eq!(leases.acquire(&pool(), &owner("a"), Some(wanted)).unwrap(), wanted);
        assert!(matches!(leases.acquire(&pool(), &owner("b"), Some(wanted)), Err(Error::Taken(_))));
        for reserved in [0, 1, 7, 8] {
            let wanted = Ipv4Addr::new(10, 42, 1, reserved);
            assert!(matches!(leases.acquire(&pool(), &owner("b"), Some(wanted)), Err(Error::NotInPool(_))));
        }
    }

    #[test]
    fn a_reboot_frees_everything() {
        let state = tempfile::tempdir().unwrap();
        let before = Leases::open_for(state.path(), "one").unwrap();
        for name in ["a", "b", "c", "d", "e"] {
            before.acquire(&pool(), &owner(name), None).unwrap();
        }
        drop(before);
        let after = Leases::open_for(state.path(), "two").unwrap();
        assert_eq!(after.all().unwrap(), []);
        after.acquire(&pool(), &owner("f"), None).unwrap();
        assert!(!state.path().join("boot-one").exists());
    }

    #[test]
    fn threads_never_get_the_same_address() {
        let state = tempfile::tempdir().unwrap();
        let pool = Pool::new("10.42.1.0/24".parse().unwrap(), Ipv4Addr::new(10, 42, 1, 1));
        let mut all: Vec<Ipv4Addr> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    let (state, pool) = (state.path(), &pool);
                    scope.spawn(move || {
                        let acquire = |n| {
                            let owner = owner(&format!("{thread}-{n}"));
                            Leases::open(state).unwrap().acquire(pool, &owner, None).unwrap()
                        };
                        (0..30).map(acquire).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 240);
    }
}
