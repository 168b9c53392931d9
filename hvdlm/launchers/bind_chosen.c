/*
 * Preloaded into the processes of a job over MPI on several hosts: where MPI would listen on every interface, it listens
 * on the one the job was told to use. Open MPI's *_if_include only choose the addresses that are told to the others; the
 * sockets are bound to 0.0.0.0 and [::].
 *
 * HVDLM_BIND_NETWORK holds the network, as in 10.0.0.0/24. Only calls from MPI's own libraries are changed: a server
 * that the script starts listens where it wants.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static int from_mpi(void *caller) {
  static const char *const names[] = {"libmpi", "libopen-", "libprrte", "libpmix", "libmpich", "mca_", "libuc",
                                      "libfabric", "libevent", "mpiexec", "mpirun", "prte", "hydra_", 0};
  Dl_info info;
  if (!dladdr(caller, &info) || !info.dli_fname) return 0;
  const char *slash = strrchr(info.dli_fname, '/');
  const char *name = slash ? slash + 1 : info.dli_fname;
  for (int i = 0; names[i]; i++)
    if (!strncmp(name, names[i], strlen(names[i]))) return 1;
  return 0;
}

/* The address of this host in the network; 0 if it has none. */
static in_addr_t chosen(const char *network) {
  char text[64];
  struct in_addr base;
  strncpy(text, network, sizeof text - 1);
  text[sizeof text - 1] = 0;
  char *slash = strchr(text, '/');
  if (!slash) return 0;
  *slash = 0;
  int length = atoi(slash + 1);
  if (length < 1 || length > 32 || inet_pton(AF_INET, text, &base) != 1) return 0;
  in_addr_t mask = htonl(0xffffffffu << (32 - length)), found = 0;
  struct ifaddrs *all, *one;
  if (getifaddrs(&all)) return 0;
  for (one = all; one && !found; one = one->ifa_next)
    if (one->ifa_addr && one->ifa_addr->sa_family == AF_INET) {
      in_addr_t address = ((struct sockaddr_in *)one->ifa_addr)->sin_addr.s_addr;
      if ((address & mask) == (base.s_addr & mask)) found = address;
    }
  freeifaddrs(all);
  return found;
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
  static int (*next)(int, const struct sockaddr *, socklen_t);
  if (!next) next = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
  const char *network = getenv("HVDLM_BIND_NETWORK");
  if (network && address && from_mpi(__builtin_return_address(0))) {
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
      struct sockaddr_in changed;
      memcpy(&changed, address, sizeof changed);
      if (changed.sin_addr.s_addr == htonl(INADDR_ANY) && (changed.sin_addr.s_addr = chosen(network)))
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    } else if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
      struct sockaddr_in6 changed;
      memcpy(&changed, address, sizeof changed);
      if (IN6_IS_ADDR_UNSPECIFIED(&changed.sin6_addr)) {
        changed.sin6_addr = in6addr_loopback; /* hosts are told IPv4 addresses */
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
      }
    }
  }
  return next(fd, address, length);
}
