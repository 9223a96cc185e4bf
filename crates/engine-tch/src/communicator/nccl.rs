//! NCCL between GPUs, one rank a device. The library is found at run time; nothing waits for a peer without a deadline:
//! every call is non-blocking, and whoever is late is given up by aborting the communicator.
//!
//! Functions are bound here by name and only their types come from `cudarc`, whose own loader does not know the name
//! `libnccl.so.2` under which the library is installed.

use super::{Communicator, ReduceOp, still_wanted};
use crate::cuda::library::Library;
use crate::cuda::stream::Stream;
use crate::fault::{Fault, Result};
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use engine::Progress;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

pub(crate) const UNIQUE_ID_BYTES: usize = 128;

/// What rank 0 makes and all ranks need to meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UniqueId(pub(crate) [u8; UNIQUE_ID_BYTES]);

/// `ncclResult_t`, as a number: a newer library may have more of them than the bindings know.
type Code = c_int;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

/// `NCCL_CONFIG_UNDEF_INT` and the mark of an initialised configuration, from nccl.h.
const UNDEFINED: c_int = c_int::MIN;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// The version whose configuration `cudarc` describes: 2.28.
const CONFIG_VERSION: u32 = 22_800;

/// Pause between looks at a group that forms.
const FORMING_PAUSE: Duration = Duration::from_millis(1);
/// A reduction takes tens of microseconds: looks come without pause at first.
const SPIN: Duration = Duration::from_micros(500);
const REDUCING_PAUSE: Duration = Duration::from_micros(50);

/// The functions of the library that are used.
#[derive(Clone, Copy)]
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    init: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        *mut c_void,
    ) -> Code,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut Code) -> Code,
    abort: unsafe extern "C" fn(ncclComm_t) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
}

impl Api {
    /// The process's library.
    fn get() -> Result<&'static Self> {
        static API: OnceLock<std::result::Result<Api, String>> = OnceLock::new();
        API.get_or_init(Self::load).as_ref().map_err(|why| Fault::Collective(why.clone()))
    }

    fn load() -> std::result::Result<Self, String> {
        let library = Library::open(&["libnccl.so.2", "libnccl.so"]).map_err(|why| {
            format!("NCCL was not found ({why}); install nvidia-nccl-cu13 or use `--collectives gloo`")
        })?;
        // SAFETY: the names are NCCL's, whose signatures since 2.14 are these.
        unsafe {
            Ok(Self {
                get_unique_id: library.function(c"ncclGetUniqueId")?,
                init: library.function(c"ncclCommInitRankConfig")?,
                all_reduce: library.function(c"ncclAllReduce")?,
                async_error: library.function(c"ncclCommGetAsyncError")?,
                abort: library.function(c"ncclCommAbort")?,
                error_string: library.function(c"ncclGetErrorString")?,
            })
        }
    }

    fn fault(&self, what: &str, code: Code) -> Fault {
        // SAFETY: NCCL answers with a constant string for any number.
        let text = unsafe {
            let text = (self.error_string)(code);
            if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        Fault::Collective(format!("NCCL: {what}: {text} (code {code})"))
    }

    fn check(&self, what: &str, code: Code) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            other => Err(self.fault(what, other)),
        }
    }
}

/// A new id; rank 0 calls this once for a group.
pub(crate) fn unique_id() -> Result<UniqueId> {
    let api = Api::get()?;
    let mut id = ncclUniqueId { internal: [0; UNIQUE_ID_BYTES] };
    // SAFETY: fills the id.
    let code = unsafe { (api.get_unique_id)(&raw mut id) };
    if code != SUCCESS {
        return Err(api.fault("making an id", code));
    }
    Ok(UniqueId(id.internal.map(|byte| byte as u8)))
}

/// One rank's communicator.
pub(crate) struct Nccl {
    api: Api,
    /// Null once it was given up.
    raw: ncclComm_t,
    stream: Box<dyn Stream>,
    device: Device,
    tp_rank: usize,
    tp_degree: usize,
    timeout: Duration,
    progress: Arc<Progress>,
}

impl Nccl {
    /// Joins the group of `id` on `device`. Waits for all ranks, at most `timeout`, which holds for reductions too. When
    /// `progress` is told to give up, every wait ends.
    pub(crate) fn join(
        id: &UniqueId,
        device: Device,
        tp_rank: usize,
        tp_degree: usize,
        timeout: Duration,
        progress: Arc<Progress>,
    ) -> Result<Self> {
        let stream = crate::cuda::stream::of(device)?;
        let unformed = Self {
            api: *Api::get()?,
            raw: null_mut(),
            stream,
            device,
            tp_rank,
            tp_degree,
            timeout,
            progress,
        };
        unformed.form(id)
    }

    fn form(self, id: &UniqueId) -> Result<Self> {
        let mut group = self;
        let Self { api, tp_rank, tp_degree, timeout, .. } = group;
        let id = ncclUniqueId { internal: id.0.map(|byte| byte as c_char) };
        let mut config = non_blocking();
        // SAFETY: the pointers are live for the call; the configuration is one of version 2.28.
        let code = unsafe {
            (api.init)(&raw mut group.raw, tp_degree as c_int, id, tp_rank as c_int, &raw mut config)
        };
        api.check("forming the group", code)?;
        let deadline = Instant::now() + timeout;
        while group.in_progress("forming the group")? {
            group.still_wanted()?;
            if Instant::now() >= deadline {
                group.give_up();
                return Err(Fault::Collective(format!(
                    "NCCL: the {tp_degree} ranks did not meet within {timeout:?}"
                )));
            }
            std::thread::sleep(FORMING_PAUSE);
        }
        Ok(group)
    }

    /// Whether the last call still works; an error gives the group up.
    fn in_progress(&mut self, what: &str) -> Result<bool> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live.
        let asked = unsafe { (self.api.async_error)(self.raw, &raw mut state) };
        let state = if asked == SUCCESS { state } else { asked };
        match state {
            SUCCESS => Ok(false),
            IN_PROGRESS => Ok(true),
            other => {
                let fault = self.api.fault(what, other);
                self.give_up();
                Err(fault)
            }
        }
    }

    /// Frees the communicator at once; what the device still works on for it returns.
    fn give_up(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: the communicator is live and is forgotten here.
            let _ = unsafe { (self.api.abort)(self.raw) };
            self.raw = null_mut();
        }
    }

    /// Gives the group up once the session is over.
    fn still_wanted(&mut self) -> Result<()> {
        let wanted = still_wanted(&self.progress);
        if wanted.is_err() {
            self.give_up();
        }
        wanted
    }

    /// Until the call is under way and the device has done it.
    fn finish(&mut self) -> Result<()> {
        let started = Instant::now();
        let late = |group: &mut Self| {
            group.give_up();
            Fault::Collective(format!("NCCL: a reduction did not end within {:?}", group.timeout))
        };
        let mut recorded = false;
        loop {
            let in_progress = self.in_progress("a reduction")?;
            if !in_progress && !recorded {
                self.stream.record()?;
                recorded = true;
            }
            if recorded && self.stream.reached()? {
                return Ok(());
            }
            self.still_wanted()?;
            let waited = started.elapsed();
            if waited >= self.timeout {
                return Err(late(self));
            }
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(REDUCING_PAUSE);
            }
        }
    }
}

impl Communicator for Nccl {
    fn tp_rank(&self) -> usize {
        self.tp_rank
    }

    fn tp_degree(&self) -> usize {
        self.tp_degree
    }

    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()> {
        if self.raw.is_null() {
            return Err(Fault::Collective("NCCL: the group was given up; form a new one".into()));
        }
        if values.numel() == 0 {
            return Ok(());
        }
        if values.device() != self.device || !values.is_contiguous() {
            return Err(Fault::Refused(format!(
                "NCCL reduces contiguous tensors on {:?}; this one is on {:?}",
                self.device,
                values.device()
            )));
        }
        let (dtype, op) = (data_type(values.kind())?, reduction(op));
        let (data, stream) = (values.data_ptr(), self.stream.handle()?);
        // SAFETY: the tensor has so many elements of that type on the communicator's device, and is alive until the
        // device is done with it, which `finish` waits for.
        let code = unsafe { (self.api.all_reduce)(data, data, values.numel(), dtype, op, self.raw, stream) };
        self.api.check("a reduction", code)?;
        self.finish()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.give_up();
    }
}

fn data_type(kind: Kind) -> Result<ncclDataType_t> {
    [
        (Kind::Float, ncclDataType_t::ncclFloat32),
        (Kind::Double, ncclDataType_t::ncclFloat64),
        (Kind::BFloat16, ncclDataType_t::ncclBfloat16),
        (Kind::Half, ncclDataType_t::ncclFloat16),
        (Kind::Int64, ncclDataType_t::ncclInt64),
    ]
    .into_iter()
    .find_map(|(known, data_type)| (known == kind).then_some(data_type))
    .ok_or_else(|| Fault::Refused(format!("NCCL does not reduce tensors of {kind:?}")))
}

fn reduction(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

/// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`.
fn non_blocking() -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

#[cfg(test)]
mod tests {
    //! A library of a few lines stands for NCCL: what is tested is who waits for what, and for how long.

    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static ABORTS: AtomicUsize = AtomicUsize::new(0);

    /// What the fake does is written in the id's first byte, and kept as the communicator.
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(u8)]
    enum Story {
        Works = 1,
        NobodyComes = 2,
        PeerIsLostWhileForming = 3,
        PeerIsLostLater = 4,
        RefusedAtOnce = 5,
        ReductionHangs = 6,
    }

    fn story(comm: ncclComm_t) -> usize {
        comm as usize
    }

    unsafe extern "C" fn get_unique_id(_: *mut ncclUniqueId) -> Code {
        SUCCESS
    }

    unsafe extern "C" fn init(
        comm: *mut ncclComm_t,
        _: c_int,
        id: ncclUniqueId,
        _: c_int,
        config: *mut ncclConfig_t,
    ) -> Code {
        let number = id.internal[0] as usize;
        // SAFETY: the caller's own places.
        unsafe {
            assert_eq!(((*config).blocking, (*config).magic), (0, CONFIG_MAGIC));
            if number == Story::RefusedAtOnce as usize {
                return 4;
            }
            *comm = number as ncclComm_t;
        }
        IN_PROGRESS
    }

    unsafe extern "C" fn all_reduce(
        _: *const c_void,
        _: *mut c_void,
        _: usize,
        _: ncclDataType_t,
        _: ncclRedOp_t,
        comm: ncclComm_t,
        _: *mut c_void,
    ) -> Code {
        if story(comm) == Story::PeerIsLostLater as usize { 6 } else { IN_PROGRESS }
    }

    unsafe extern "C" fn async_error(comm: ncclComm_t, out: *mut Code) -> Code {
        let state = match story(comm) {
            2 => IN_PROGRESS,
            3 => 6,
            _ => SUCCESS,
        };
        // SAFETY: the caller's own place.
        unsafe { *out = state };
        SUCCESS
    }

    unsafe extern "C" fn abort(_: ncclComm_t) -> Code {
        ABORTS.fetch_add(1, Ordering::SeqCst);
        SUCCESS
    }

    unsafe extern "C" fn error_string(_: Code) -> *const c_char {
        c"remote process exited".as_ptr()
    }

    const FAKE: Api = Api { get_unique_id, init, all_reduce, async_error, abort, error_string };

    struct FakeStream {
        hangs: bool,
    }

    impl Stream for FakeStream {
        fn handle(&self) -> Result<*mut c_void> {
            Ok(null_mut())
        }

        fn record(&mut self) -> Result<()> {
            Ok(())
        }

        fn reached(&mut self) -> Result<bool> {
            Ok(!self.hangs)
        }
    }

    fn join(story: Story) -> Result<Nccl> {
        join_watched(story, Duration::from_millis(150), Arc::default())
    }

    fn join_watched(story: Story, timeout: Duration, progress: Arc<Progress>) -> Result<Nccl> {
        let mut id = [0; UNIQUE_ID_BYTES];
        id[0] = story as u8;
        let stream = Box::new(FakeStream { hangs: story == Story::ReductionHangs });
        let unformed = Nccl {
            api: FAKE,
            raw: null_mut(),
            stream,
            device: Device::Cpu,
            tp_rank: 0,
            tp_degree: 2,
            timeout,
            progress,
        };
        unformed.form(&UniqueId(id))
    }

    /// Tells a progress to give up after a moment.
    fn ends_soon() -> Arc<Progress> {
        let progress = Arc::<Progress>::default();
        let ends = progress.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            ends.give_up();
        });
        progress
    }

    fn values() -> Tensor {
        Tensor::ones([4], (Kind::Float, Device::Cpu))
    }

    fn text(fault: Fault) -> String {
        let Fault::Collective(text) = fault else { panic!("expected a collective's fault, got {fault:?}") };
        text
    }

    /// Where the library is, making an id needs no device; where it is not, that is said.
    #[test]
    fn an_id_is_made_wherever_the_library_is() {
        match Api::get() {
            Ok(_) => {
                let (one, two) = (unique_id().unwrap(), unique_id().unwrap());
                assert_ne!(one, two);
            }
            Err(fault) => {
                let fault = text(fault);
                assert!(fault.contains("libnccl.so.2") && fault.contains("--collectives gloo"), "{fault}");
            }
        }
    }

    /// One test, as the counter of aborts is one.
    #[test]
    fn every_wait_ends_and_a_lost_group_is_given_up_once() {
        let aborts = || ABORTS.swap(0, Ordering::SeqCst);
        let mut group = join(Story::Works).unwrap();
        group.all_reduce(&mut values(), ReduceOp::Sum).unwrap();
        group.all_reduce(&mut Tensor::zeros([0], (Kind::Float, Device::Cpu)), ReduceOp::Max).unwrap();
        assert!(matches!(
            group.all_reduce(&mut values().to_kind(Kind::Bool), ReduceOp::Sum),
            Err(Fault::Refused(_))
        ));
        let strided = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).tr();
        assert!(matches!(
            group.all_reduce(&mut strided.shallow_clone(), ReduceOp::Sum),
            Err(Fault::Refused(_))
        ));
        assert_eq!(aborts(), 0);
        drop(group);
        assert_eq!(aborts(), 1);

        let started = Instant::now();
        let fault = text(join(Story::NobodyComes).err().unwrap());
        assert!(fault.contains("did not meet"), "{fault}");
        assert!(started.elapsed() < Duration::from_secs(5));
        assert_eq!(aborts(), 1);

        let fault = text(join(Story::PeerIsLostWhileForming).err().unwrap());
        assert!(fault.contains("remote process exited"), "{fault}");
        assert_eq!(aborts(), 1);

        let fault = text(join(Story::RefusedAtOnce).err().unwrap());
        assert!(fault.contains("code 4"), "{fault}");
        assert_eq!(aborts(), 0, "there was no group yet");

        let mut group = join(Story::PeerIsLostLater).unwrap();
        assert!(text(group.all_reduce(&mut values(), ReduceOp::Sum).unwrap_err()).contains("code 6"));
        drop(group);
        assert_eq!(aborts(), 1);

        let mut group = join(Story::ReductionHangs).unwrap();
        let fault = text(group.all_reduce(&mut values(), ReduceOp::Sum).unwrap_err());
        assert!(fault.contains("did not end"), "{fault}");
        let fault = text(group.all_reduce(&mut values(), ReduceOp::Sum).unwrap_err());
        assert!(fault.contains("given up"), "{fault}");
        drop(group);
        assert_eq!(aborts(), 1);

        // A session that ends.
        let (started, long) = (Instant::now(), Duration::from_secs(60));
        let fault = text(join_watched(Story::NobodyComes, long, ends_soon()).err().unwrap());
        assert!(fault.contains("the session is over"), "{fault}");
        assert_eq!(aborts(), 1);
        let mut group = join_watched(Story::ReductionHangs, long, ends_soon()).unwrap();
        let fault = text(group.all_reduce(&mut values(), ReduceOp::Sum).unwrap_err());
        assert!(fault.contains("the session is over"), "{fault}");
        assert_eq!(aborts(), 1);
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
