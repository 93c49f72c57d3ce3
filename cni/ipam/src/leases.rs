//! Who holds which address: a log of what was given, one line for each, in their order.
//!
//! A line begins with `+` while its address is held. It is written by one write(2) at the log's end, and a line without its end, as
//! a kill may leave it, counts for nothing. Giving back overwrites the `+` in place: one byte, which needs no room on a full
//! disk. So there is no moment at which a kill leaves half a lease. What a killed ADD leaves is a whole lease of a known owner, which
//! the next ADD of that owner takes over, and DEL or GC gives back. Nothing is synced: leases don't outlive a boot, because no
//! namespace does. The log lies in a folder named by the boot; folders of earlier boots are removed by the first ADD.
//!
//! Why no file for each lease: making and removing one costs some ten times as much, and reading them grows with their number.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, readlinkat};
use nix::sys::stat::Mode;

use crate::Pool;
use log::{Book, Line};

mod log;

/// Names the boot that the kernel is in.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Hexadecimal digits in five groups.
const BOOT_ID_BYTES: usize = 36;

/// The log's name. It is locked for as long as it is read or changed.
const LOG: &str = "leases";

/// The log is written anew when it has more lines that are given back than others, and more than this of them.
const DEAD_BYTES: usize = 16 << 10;

/// The folder of the addresses that ports of the node lead to: links named `address@device`, pointing at `container/interface`.
const PORTS: &str = "ports";

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

/// The leases of one network on this node.
#[derive(Clone, Debug)]
pub struct Leases {
    state: PathBuf,
    folder: PathBuf,
}

/// Keeps other processes from acquiring addresses and mapping ports for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    log: Flock<File>,
}

impl Leases {
    /// The leases of this boot below `state`.
    ///
    /// # Errors
    /// If the boot has no name.
    pub fn open(state: &Path) -> Result<Self, Error> {
        let failed = failed("read", Path::new(BOOT_ID));
        let mut boot = [0; BOOT_ID_BYTES];
        File::open(BOOT_ID).and_then(|mut file| file.read_exact(&mut boot)).map_err(&failed)?;
        let boot = str::from_utf8(&boot);
        let boot = boot.map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        Ok(Self::open_for(state, boot))
    }

    fn open_for(state: &Path, boot: &str) -> Self {
        Self { state: state.to_path_buf(), folder: state.join(format!("boot-{boot}")) }
    }

    /// Locks the leases, and makes their folder if it is missing, in place of those of earlier boots. Who reads or changes leases
    /// waits for it, the holder of the lock too: it may only deal with ports.
    ///
    /// # Errors
    /// If the folder can't be made.
    pub fn lock(&self) -> Result<Lock, Error> {
        let open = || {
            File::options().create(true).truncate(false).read(true).write(true).open(self.folder.join(LOG))
        };
        loop {
            let log = match open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_folder()?;
                    open()
                }
                other => other,
            };
            let log = self.locked(log, FlockArg::LockExclusive)?;
            if let Some(log) = log {
                return Ok(Lock { log });
            }
        }
    }

    /// The log for reading; `None` if there is none.
    fn shared(&self) -> Result<Option<Flock<File>>, Error> {
        loop {
            let log = match File::open(self.folder.join(LOG)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other,
            };
            let log = self.locked(log, FlockArg::LockShared)?;
            if log.is_some() {
                return Ok(log);
            }
        }
    }

    /// Waits for the log's lock; `None` if it was written anew in the meantime, and this is the old one.
    fn locked(&self, log: io::Result<File>, how: FlockArg) -> Result<Option<Flock<File>>, Error> {
        let path = self.folder.join(LOG);
        let log = log.map_err(failed("open", &path))?;
        let log = Flock::lock(log, how).map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        let links = log.metadata().map_err(failed("read", &path))?.nlink();
        Ok((links > 0).then_some(log))
    }

    fn make_folder(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.state).map_err(failed("create", &self.state))?;
        for entry in fs::read_dir(&self.state).map_err(failed("read", &self.state))? {
            let path = entry.map_err(failed("read", &self.state))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("boot-") && path != self.folder {
                match fs::remove_dir_all(&path) {
                    // Another call's first.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    other => other.map_err(failed("remove", &path))?,
                }
            }
        }
        match fs::create_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(failed("create", &self.folder)(error))
            }
            _ => Ok(()),
        }
    }

    /// What a log says.
    fn read(&self, log: &File) -> Result<String, Error> {
        let failed = failed("read", &self.folder.join(LOG));
        let length = log.metadata().map_err(&failed)?.len();
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        log.read_exact_at(&mut bytes, 0).map_err(&failed)?;
        String::from_utf8(bytes).or_else(|error| {
            let whole = error.utf8_error().valid_up_to();
            let mut bytes = error.into_bytes();
            // What a kill left of a line may end within a character; it counts for nothing, whole or not.
            if bytes[whole..].contains(&b'\n') {
                return Err(failed(io::ErrorKind::InvalidData.into()));
            }
            bytes.truncate(whole);
            String::from_utf8(bytes)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))
        })
    }

    /// All leases.
    ///
    /// # Errors
    /// If the log can't be read.
    pub fn all(&self) -> Result<Vec<Lease>, Error> {
        let Some(log) = self.shared()? else { return Ok(Vec::new()) };
        let text = self.read(&log)?;
        Ok(Book::read(&text).held().map(Line::lease).collect())
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
        let target = format!("{}/{}", mapped.owner.container, mapped.owner.ifname);
        symlink(target, &path).map_err(failed("create", &path))
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
        if let Some(stray) = wanted.iter().find(|wanted| !pools.iter().any(|pool| pool.holds(**wanted))) {
            return Err(Error::NotInPool(*stray));
        }
        let lock = self.lock()?;
        let text = self.read(&lock.log)?;
        let book = Book::read(&text);
        let mut all: Vec<Acquired> = Vec::with_capacity(pools.len());
        for pool in pools {
            let offset = all.first().zip(pools.first()).and_then(|(one, first)| first.offset(one.address));
            all.push(choose(pool, owner, wanted, &book, offset)?);
        }
        let fresh: String =
            all.iter().filter(|one| one.fresh).map(|one| log::line(one.address, owner)).collect();
        if book.dead_bytes > DEAD_BYTES.max(book.whole_bytes / 2) {
            self.write_anew(&(book.kept() + &fresh))?;
        } else if !fresh.is_empty() {
            self.append(&lock.log, &fresh, book.whole_bytes)?;
        }
        Ok(all)
    }

    /// Writes lines behind those that are whole: over what a kill left of one, if that was the case.
    fn append(&self, log: &File, lines: &str, at: usize) -> Result<(), Error> {
        let failed = failed("write", &self.folder.join(LOG));
        // No write_all: what is short is taken back whole.
        let written = match log.write_at(lines.as_bytes(), at as u64) {
            Ok(written) if written == lines.len() => return Ok(()),
            Ok(_) => io::Error::from(io::ErrorKind::StorageFull),
            Err(error) => error,
        };
        log.set_len(at as u64).map_err(&failed)?;
        Err(failed(written))
    }

    /// Puts another log in the place of the one that is locked; who waits for that one's lock looks again.
    fn write_anew(&self, text: &str) -> Result<(), Error> {
        let (path, fresh) = (self.folder.join(LOG), self.folder.join("leases.new"));
        fs::write(&fresh, text).map_err(failed("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(failed("replace", &path))
    }

    /// Gives back what was acquired fresh, and keeps what was held before.
    ///
    /// # Errors
    /// If the log can't be changed.
    pub fn give_back(&self, acquired: &[Acquired]) -> Result<(), Error> {
        let fresh: BTreeSet<IpAddr> =
            acquired.iter().filter(|one| one.fresh).map(|one| one.address).collect();
        self.remove_those(|line| fresh.contains(&line.address))
    }

    /// Gives back everything that an owner holds; nothing held is no error.
    ///
    /// # Errors
    /// If the log can't be changed.
    pub fn release(&self, owner: &Owner) -> Result<(), Error> {
        self.remove_those(|line| line.is_of(owner))
    }

    /// What an owner holds.
    ///
    /// # Errors
    /// If the log can't be read.
    pub fn held(&self, owner: &Owner) -> Result<Vec<IpAddr>, Error> {
        let Some(log) = self.shared()? else { return Ok(Vec::new()) };
        let text = self.read(&log)?;
        Ok(Book::read(&text).held().filter(|line| line.is_of(owner)).map(|line| line.address).collect())
    }

    fn remove_those(&self, goes: impl Fn(&Line<'_>) -> bool) -> Result<(), Error> {
        // Nothing was ever given: nothing is made either.
        if !self.folder.join(LOG).exists() {
            return Ok(());
        }
        let lock = self.lock()?;
        let text = self.read(&lock.log)?;
        for line in Book::read(&text).held().filter(|line| goes(line)) {
            let given_back = lock.log.write_all_at(log::GIVEN_BACK.as_bytes(), line.at as u64);
            given_back.map_err(failed("write", &self.folder.join(LOG)))?;
        }
        Ok(())
    }
}

/// The address of a pool for an owner.
fn choose(
    pool: &Pool,
    owner: &Owner,
    wanted: &[IpAddr],
    book: &Book<'_>,
    offset: Option<u128>,
) -> Result<Acquired, Error> {
    let mut wanted = wanted.iter().copied().filter(|wanted| pool.holds(*wanted));
    if let Some(address) = wanted.next() {
        if let Some(second) = wanted.next() {
            return Err(Error::Second(second));
        }
        return match book.held().find(|line| line.address == address) {
            None => Ok(Acquired { address, fresh: true }),
            Some(line) if line.is_of(owner) => Ok(Acquired { address, fresh: false }),
            Some(_) => Err(Error::Taken(address)),
        };
    }
    // A pool that was changed may no longer have what is held.
    if let Some(held) = book.held().find(|line| line.is_of(owner) && pool.holds(line.address)) {
        return Ok(Acquired { address: held.address, fresh: false });
    }
    let used: BTreeSet<IpAddr> = book.held().map(|line| line.address).collect();
    let same = offset.and_then(|offset| pool.at(offset)).filter(|address| !used.contains(address));
    let last = book.last().find(|last| pool.serves(*last));
    let next = || pool.next(last, |address| used.contains(&address));
    let address = same.or_else(next).ok_or(Error::Exhausted)?;
    Ok(Acquired { address, fresh: true })
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

fn failed(op: &'static str, path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { op, path: path.clone(), source }
}

#[cfg(test)]
mod tests;
