# For LOCKSTEP_PORTABLE: gRPC, Protobuf and every other library of the distribution that has an archive
# is linked from it, but for Abseil, whose archives the CUDA module (a shared object) cannot take: a
# process shall have one Abseil, so all take the shared ones. What stays shared lies in lib/ beside
# bin/, where programs, module and those libraries themselves look (DT_RPATH, which is inherited, and
# not DT_RUNPATH).
if(NOT LOCKSTEP_HAVE_LLD)
  message(FATAL_ERROR "LOCKSTEP_PORTABLE needs lld, which takes archives in any order")
endif()
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN/../lib")
add_link_options(-Wl,--disable-new-dtags -Wl,--as-needed -Wl,--gc-sections)

get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
foreach(target ${targets})
  get_target_property(type ${target} TYPE)
  if(target MATCHES "^absl::" OR NOT type MATCHES "^(SHARED|UNKNOWN)_LIBRARY$")
    continue()
  endif()
  foreach(suffix "" _NONE _RELEASE)
    get_target_property(location ${target} IMPORTED_LOCATION${suffix})
    string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive "${location}")
    if(archive MATCHES "\\.a$" AND EXISTS ${archive})
      set_target_properties(${target} PROPERTIES IMPORTED_LOCATION${suffix} ${archive})
    endif()
  endforeach()
endforeach()
