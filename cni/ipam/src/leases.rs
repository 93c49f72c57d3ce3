//! Who holds which address: one symbolic link per lease, named by the address, pointing at `container/interface`.
//!
//! symlink(2) makes the lease and its content in one step, and fails if the address is taken: there is no moment at which
//! a kill leaves half a lease. What a killed ADD leaves is a whole lease of a known owner, which the next ADD of that owner
//! takes over, and DEL or GC gives back. Nothing is synced: leases don't outlive a boot, because no namespace does. They lie
//! in a folder named by the boot; folders of earlier boots are removed by the first ADD.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, readlinkat};
use nix::sys::stat::Mode;

use crate::Pool;

/// Names the boot that the kernel is in.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Held while an address is acquired. It says which of each family was given last: only a hint, and cheaper than a file of its own.
const LOCK: &str = "lock";

/// More than the text of an address of each family. Always as many, so that one write replaces all that was there.
const HINT_BYTES: usize = 128;

/// The folder of the addresses that ports of the node lead to: links named `address@device`, pointing as leases do.
const PORTS: &str = "ports";

/// A container's interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The container's id. Holds no `/`.
    pub container: String,
    /// The interface's name. Holds no `/`.
    pub ifname: String,
}

impl Owner {
    /// As links point to it.
    fn to_target(&self) -> String {
        format!("{}/{}", self.container, self.ifname)
    }
}

/// An address and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: IpAddr,
    /// Its holder.
    pub owner: Owner,
}

/// An address that was acquired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// The address.
    pub address: IpAddr,
    /// Whether the owner didn't hold it before: then a failure gives it back.
    pub fresh: bool,
}

/// Why a lease could not be had, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every address is taken.
    #[error("no address is free in the pod subnet")]
    Exhausted,
    /// The address that was asked for is not one of the pool.
    #[error("the address {0} is not one for pods")]
    NotInPool(IpAddr),
    /// The address that was asked for is taken.
    #[error("the address {0} is held by another container")]
    Taken(IpAddr),
    /// More than one address was asked for of a pool.
    #[error("the address {0} is the second of its family that was asked for")]
    Second(IpAddr),
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

/// An address that ports of the node lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The address.
    pub address: IpAddr,
    /// The node's device by which it is reached.
    pub device: String,
    /// Whose address it is.
    pub owner: Owner,
}

/// The leases of one network on this node. Reading and giving back take no lock: each lease changes in one step.
#[derive(Clone, Debug)]
pub struct Leases {
    state: PathBuf,
    folder: PathBuf,
}

/// Keeps other processes from acquiring addresses and mapping ports for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    file: Flock<File>,
}

impl Leases {
    /// The leases of this boot below `state`.
    ///
    /// # Errors
    /// If the boot has no name.
    pub fn open(state: &Path) -> Result<Self, Error> {
        let boot = fs::read_to_string(BOOT_ID).map_err(failed("read", Path::new(BOOT_ID)))?;
        Ok(Self::open_for(state, boot.trim()))
    }

    fn open_for(state: &Path, boot: &str) -> Self {
        Self { state: state.to_path_buf(), folder: state.join(format!("boot-{boot}")) }
    }

    /// Locks the leases, and makes their folder if it is missing, in place of those of earlier boots.
    ///
    /// # Errors
    /// If the folder can't be made.
    pub fn lock(&self) -> Result<Lock, Error> {
        let path = self.state.join(LOCK);
        let open = || File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.state).map_err(failed("create", &self.state))?;
                open()
            }
            other => other,
        };
        let file = file.map_err(failed("open", &path))?;
        let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| Error::Io {
            op: "lock",
            path: path.clone(),
            source: errno.into(),
        })?;
        if !self.folder.is_dir() {
            forget_earlier_boots(&self.state)?;
            fs::create_dir(&self.folder).map_err(failed("create", &self.folder))?;
        }
        Ok(Lock { file })
    }

    /// All leases.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn all(&self) -> Result<Vec<Lease>, Error> {
        let named = entries(&self.folder)?;
        let leases = named.into_iter().filter_map(|(name, owner)| Some((name.parse().ok()?, owner)));
        Ok(leases.map(|(address, owner)| Lease { address, owner }).collect())
    }

    /// All addresses that ports of the node lead to.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn mapped(&self) -> Result<Vec<Mapped>, Error> {
        let read = |(name, owner): (String, Owner)| {
            let (address, device) = name.split_once('@')?;
            Some(Mapped { address: address.parse().ok()?, device: device.to_owned(), owner })
        };
        Ok(entries(&self.folder.join(PORTS))?.into_iter().filter_map(read).collect())
    }

    /// Notes that ports will lead to an address: before they do, so that a kill leaves no port that nobody knows of.
    ///
    /// # Errors
    /// If the note can't be written.
    pub fn note_mapped(&self, mapped: &Mapped, _locked: &Lock) -> Result<(), Error> {
        let folder = self.folder.join(PORTS);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("create", &folder)(error));
            }
            _ => {}
        }
        let path = self.mapped_path(mapped);
        remove(&path)?;
        symlink(mapped.owner.to_target(), &path).map_err(failed("create", &path))
    }

    /// Forgets that ports led to an address: after they do no more.
    ///
    /// # Errors
    /// If the note can't be removed.
    pub fn forget_mapped(&self, mapped: &Mapped, _locked: &Lock) -> Result<(), Error> {
        remove(&self.mapped_path(mapped))
    }

    fn mapped_path(&self, mapped: &Mapped) -> PathBuf {
        self.folder.join(PORTS).join(format!("{}@{}", mapped.address, mapped.device))
    }

    /// An address of each pool for an owner: the wanted one if given, the one it holds already, or the next that is free.
    /// All or none. The pools after the first give the address as far from their beginning as the first's, if it is free: what
    /// belongs together looks so, and changes hands together.
    ///
    /// # Errors
    /// If a pool has none left, or a wanted one can't be had.
    pub fn acquire(&self, pools: &[Pool], owner: &Owner, wanted: &[IpAddr]) -> Result<Vec<Acquired>, Error> {
        let lock = self.lock()?;
        let last = lock.hint();
        let leases = self.all()?;
        if let Some(stray) = wanted.iter().find(|wanted| !pools.iter().any(|pool| pool.holds(**wanted))) {
            return Err(Error::NotInPool(*stray));
        }
        let mut all: Vec<Acquired> = Vec::with_capacity(pools.len());
        for pool in pools {
            let offset = all.first().zip(pools.first()).and_then(|(one, first)| first.offset(one.address));
            match self.acquire_one(pool, owner, wanted, &leases, (offset, &last)) {
                Ok(acquired) => all.push(acquired),
                Err(error) => {
                    self.give_back(&all)?;
                    return Err(error);
                }
            }
        }
        if all.iter().any(|one| one.fresh) {
            lock.remember(&all);
        }
        Ok(all)
    }

    fn acquire_one(
        &self,
        pool: &Pool,
        owner: &Owner,
        wanted: &[IpAddr],
        leases: &[Lease],
        (offset, last): (Option<u128>, &[IpAddr]),
    ) -> Result<Acquired, Error> {
        let holder = |address: IpAddr| leases.iter().find(|lease| lease.address == address).map(|l| &l.owner);
        let mut wanted = wanted.iter().copied().filter(|wanted| pool.holds(*wanted));
        if let Some(address) = wanted.next() {
            if let Some(second) = wanted.next() {
                return Err(Error::Second(second));
            }
            return match holder(address) {
                None => self.write(address, owner).map(|()| Acquired { address, fresh: true }),
                Some(holder) if holder == owner => Ok(Acquired { address, fresh: false }),
                Some(_) => Err(Error::Taken(address)),
            };
        }
        // A pool that was changed may no longer have what is held.
        if let Some(held) = leases.iter().find(|lease| lease.owner == *owner && pool.holds(lease.address)) {
            return Ok(Acquired { address: held.address, fresh: false });
        }
        let used: HashSet<IpAddr> = leases.iter().map(|lease| lease.address).collect();
        let same = offset.and_then(|offset| pool.at(offset)).filter(|address| !used.contains(address));
        let last = last.iter().copied().find(|last| pool.serves(*last));
        let next = || pool.next(last, |address| used.contains(&address));
        let address = same.or_else(next).ok_or(Error::Exhausted)?;
        self.write(address, owner)?;
        Ok(Acquired { address, fresh: true })
    }

    /// Gives back what was acquired fresh, and keeps what was held before.
    ///
    /// # Errors
    /// If the folder can't be changed.
    pub fn give_back(&self, acquired: &[Acquired]) -> Result<(), Error> {
        acquired.iter().filter(|one| one.fresh).try_for_each(|one| self.remove(one.address))
    }

    /// Gives back everything that an owner holds; nothing held is no error.
    ///
    /// # Errors
    /// If the folder can't be changed.
    pub fn release(&self, owner: &Owner) -> Result<(), Error> {
        self.held(owner)?.into_iter().try_for_each(|address| self.remove(address))
    }

    /// What an owner holds.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn held(&self, owner: &Owner) -> Result<Vec<IpAddr>, Error> {
        let of_owner = self.all()?.into_iter().filter(|lease| lease.owner == *owner);
        Ok(of_owner.map(|lease| lease.address).collect())
    }

    /// Gives an address back. One that nobody holds is no error.
    ///
    /// # Errors
    /// If the folder can't be changed.
    pub fn remove(&self, address: IpAddr) -> Result<(), Error> {
        remove(&self.folder.join(address.to_string()))
    }

    fn write(&self, address: IpAddr, owner: &Owner) -> Result<(), Error> {
        let path = self.folder.join(address.to_string());
        symlink(owner.to_target(), &path).map_err(failed("create", &path))
    }
}

impl Lock {
    /// The addresses that were given last; none if it isn't known.
    fn hint(&self) -> Vec<IpAddr> {
        let mut text = String::new();
        // Read wrongly or not at all, it costs some addresses their rest, and nothing else.
        let _ = (&*self.file).take(HINT_BYTES as u64).read_to_string(&mut text);
        text.split_whitespace().filter_map(|address| address.parse().ok()).collect()
    }

    fn remember(&self, given: &[Acquired]) {
        let text: Vec<String> = given.iter().map(|one| one.address.to_string()).collect();
        let text = format!("{:<1$}\n", text.join(" "), HINT_BYTES - 1);
        let _ = self.file.write_all_at(text.as_bytes(), 0);
    }
}

/// The links of a folder, each with the owner that it points to; none if the folder is missing.
fn entries(folder: &Path) -> Result<Vec<(String, Owner)>, Error> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mut listed = match Dir::open(folder, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        other => other.map_err(|errno| failed("read", folder)(errno.into()))?,
    };
    let mut names = Vec::new();
    for entry in listed.iter() {
        let entry = entry.map_err(|errno| failed("read", folder)(errno.into()))?;
        // A file system may not say what is a link; a folder is none for sure.
        if entry.file_type() != Some(Type::Directory) {
            // What isn't text isn't ours.
            names.extend(entry.file_name().to_str().ok().map(str::to_owned));
        }
    }
    let mut entries = Vec::new();
    for name in names {
        // By the open folder: the path to it need not be walked for each.
        let target = match readlinkat(&listed, name.as_str()) {
            // No link, or given back at this moment.
            Err(Errno::EINVAL | Errno::ENOENT) => continue,
            other => other.map_err(|errno| failed("read", &folder.join(&name))(errno.into()))?,
        };
        let owner = target.to_str().and_then(|target| target.split_once('/'));
        entries.extend(owner.map(|(container, ifname)| {
            (name, Owner { container: container.to_owned(), ifname: ifname.to_owned() })
        }));
    }
    Ok(entries)
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
mod tests;
